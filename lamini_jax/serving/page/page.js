// The page of a server: asks with the memory and without, shows what the memory saw, and keeps its facts.

import {drawPlot, summaryOf} from "./plot.js";

const PAGE = 50; // facts that are listed at a time
const POLL = 700; // milliseconds between two looks at what is pending
const KEY = "lamini-key";
const $ = (id) => document.getElementById(id);

// Elements are made of texts alone: nothing that a fact or an answer says is ever read as HTML.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// ---- The server ----

let asking = null; // for the key, of all requests that want one

function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key");
    dialog.addEventListener("close", () => {
      const key = $("key-text").value;
      if (dialog.returnValue === "use" && key) sessionStorage.setItem(KEY, key);
      $("key-text").value = "";
      asking = null;
      resolve(dialog.returnValue === "use");
    }, {once: true});
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

async function call(path, {method = "GET", body, signal} = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = {...(body && {"Content-Type": "application/json"}), ...(key && {Authorization: `Bearer ${key}`})};
    let response;
    try {
      response = await fetch(path, {method, headers, signal, body: body && JSON.stringify(body)});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached.");
    }
    if (response.ok) return response;
    if (response.status === 401 && (await askForKey())) continue;
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `The server answered ${response.status}.`);
  }
}

const json = async (path, options) => (await call(path, options)).json();

// The events of a stream, each an object, up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// ---- Asking ----

let running = null; // the AbortController of what is being answered
let seen = null; // what the plot shows

async function stream(model, question, signal) {
  const card = $(`${model}-answer`);
  const [text, source] = [card.querySelector(".text"), card.querySelector(".source")];
  card.classList.remove("fired");
  card.setAttribute("aria-busy", "true");
  text.replaceChildren();
  source.textContent = "";
  try {
    const body = {model, messages: [{role: "user", content: question}], stream: true, temperature: 0};
    const response = await call("/v1/chat/completions", {method: "POST", body, signal});
    let memory = null;
    for await (const event of events(response)) {
      memory = event.memory ?? memory;
      text.append(event.choices?.[0]?.delta?.content ?? "");
    }
    return {text: text.textContent, memory};
  } catch (error) {
    if (error.name !== "AbortError") text.replaceChildren(make("span", {class: "error"}, error.message));
    return {text: text.textContent, memory: null};
  } finally {
    card.setAttribute("aria-busy", "false");
  }
}

function tellSource({memory}, nearest) {
  const card = $("memory-answer");
  const source = card.querySelector(".source");
  const fact = memory?.fact && nearest?.results.find((one) => one.id === memory.fact);
  card.classList.toggle("fired", Boolean(memory?.fact));
  if (!memory?.fact) {
    source.textContent = memory || nearest ? "No fact answers this: the model speaks alone." : "";
    return;
  }
  const score = Number.isFinite(memory.score) ? `score ${memory.score.toFixed(1)}` : "the stored words";
  const badge = memory.certified ? make("span", {class: "badge"}, "certified") : null;
  source.replaceChildren(...[badge, make("span", {}, fact ? `“${fact.question}”, ${score}` : score)].filter(Boolean));
}

async function ask(question) {
  running?.abort();
  const own = (running = new AbortController());
  const {signal} = own;
  $("asked").hidden = false;
  $("stop").hidden = false;
  $("ask-status").textContent = "Asking.";
  const look = json("/v1/memories/search", {method: "POST", body: {query: question}, signal}).catch(() => null);
  look.then((nearest) => !signal.aborted && showPlot(nearest));
  const base = stream("base", question, signal);
  const memory = await stream("memory", question, signal);
  const nearest = await look;
  if (running !== own) return;
  if (!signal.aborted) tellSource(memory, nearest);
  const alone = await base;
  if (running !== own) return;
  $("stop").hidden = true;
  $("ask-status").textContent = signal.aborted
    ? "Stopped."
    : `With memory: ${memory.text}. Without: ${alone.text}. ${$("plot-summary").textContent}`;
  running = null;
}

function showPlot(nearest) {
  seen = nearest;
  $("plot-summary").textContent = nearest ? summaryOf(nearest) : "";
  $("plot").replaceChildren(...(nearest?.results.length ? [drawPlot(nearest, $("plot").clientWidth)] : []));
}

// ---- Facts ----

const shown = {search: "", limit: PAGE};
let polling = false;
let sent = 0; // facts whose tuning is being watched

function say(text, bad = false) {
  $("facts-status").textContent = text;
  $("facts-status").classList.toggle("error", bad);
}

const listed = ({search, limit}) => json(`/v1/memories?${new URLSearchParams({search, limit})}`);

async function refresh() {
  const page = await listed(shown);
  update(page.results);
  $("more").hidden = page.total <= page.results.length;
  if (shown.search) say(page.total === 1 ? "1 fact found." : `${page.total} facts found.`);
  else $("summary").textContent = page.total === 1 ? "1 fact" : `${page.total} facts`;
  if (!page.total && !shown.search) say("Nothing is stored yet. Add a fact, and ask for it.");
  return page;
}

// Rows that are as they were stay where they are, with the focus and whatever is open in them; so does a row in which
// something is being changed.
function update(facts) {
  const list = $("list");
  const known = new Map([...list.children].map((row) => [row.dataset.id, row]));
  facts.forEach((fact, index) => {
    let row = known.get(fact.id);
    if (!row || (row.dataset.fact !== JSON.stringify(fact) && !row.querySelector("form"))) {
      const focused = row?.contains(document.activeElement) && document.activeElement.getAttribute("aria-label");
      row?.remove();
      row = item(fact);
      list.insertBefore(row, list.children[index] ?? null);
      if (focused) [...row.querySelectorAll("button")].find((one) => one.ariaLabel === focused)?.focus();
    } else if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
  });
  while (list.children.length > facts.length) list.lastElementChild.remove();
}

async function watch() {
  if (polling) return;
  polling = true;
  try {
    for (;;) {
      const {pending} = await refresh();
      sent = Math.max(sent, pending);
      $("progress").hidden = !pending;
      if (!pending) break;
      $("progress-bar").max = sent;
      $("progress-bar").value = sent - pending;
      $("progress-text").textContent = `${sent - pending} of ${sent} tuned`;
      await new Promise((resolve) => setTimeout(resolve, POLL));
    }
  } finally {
    polling = false;
    sent = 0;
    $("progress").hidden = true;
  }
}

function item(fact) {
  const row = make("li", {"data-id": fact.id, "data-fact": JSON.stringify(fact)});
  const more = make("div", {class: "more", hidden: true});
  const button = (text, act) => make("button", {
    type: "button", class: "small", "aria-label": `${text}: ${fact.question}`, onclick: act,
  }, text);
  const details = button("Details", async () => {
    const open = more.hidden;
    if (open) more.replaceChildren(...(await historyOf(fact)));
    more.hidden = !open;
    details.setAttribute("aria-expanded", String(open));
  });
  details.setAttribute("aria-expanded", "false");
  row.append(make("div", {class: "fact"},
    make("h3", {}, fact.question),
    make("div", {class: "buttons"},
      make("span", {class: `badge ${fact.state}`}, fact.state),
      details,
      button("Change", () => edit(row, fact)),
      button("Forget", () => forget(row, fact))),
    make("div", {class: "said"}, fact.answer),
    fact.reason ? make("div", {class: "reason"}, fact.reason) : null,
    more));
  return row;
}

async function historyOf(fact) {
  try {
    const {results} = await json(`/v1/memories/${fact.id}/history`);
    const when = (text) => new Date(text).toLocaleString();
    const lines = results.map(({event, created_at}) => make("li", {}, `${event}, ${when(created_at)}`));
    const also = fact.also.map((text) => make("li", {}, `also asked as “${text}”`));
    const near = fact.conflicts.length
      ? [make("li", {}, `hard to tell apart from ${fact.conflicts.length} other facts in other words`)] : [];
    return [make("ul", {}, ...also, ...near, ...lines)];
  } catch (error) {
    return [make("p", {}, error.message)];
  }
}

function edit(row, fact) {
  if (row.querySelector("form")) return;
  const [answer, also] = [
    make("input", {type: "text", id: `answer-${fact.id}`, required: true, autocomplete: "off"}),
    make("textarea", {id: `also-${fact.id}`, rows: 2}),
  ];
  answer.value = fact.answer;
  also.value = fact.also.join("\n");
  const close = () => {
    form.remove();
    row.querySelector("button[aria-label^=Change]")?.focus();
  };
  const form = make("form", {class: "card", onsubmit: save, onkeydown: (event) => event.key === "Escape" && close()},
    make("div", {class: "field"}, make("label", {for: answer.id}, "Answer, word for word"), answer),
    make("div", {class: "field"},
      make("label", {for: also.id}, "The question in other words, one on each line"), also),
    make("div", {class: "actions"},
      make("button", {type: "submit", class: "strong"}, "Change"),
      make("button", {type: "button", onclick: close}, "Cancel")));
  row.append(form);
  answer.focus();

  async function save(event) {
    event.preventDefault();
    try {
      const body = {answer: answer.value, also: lines(also.value)};
      await call(`/v1/memories/${fact.id}`, {method: "PUT", body});
      form.remove();
      say("The change is being tuned.");
      await refresh();
      $("list").querySelector(`[data-id="${fact.id}"] button[aria-label^=Change]`)?.focus();
      await watch();
      say("The change holds.");
    } catch (error) {
      say(error.message, true);
    }
  }
}

async function forget(row, fact) {
  const dialog = $("forget");
  $("forget-question").textContent = fact.question;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, {once: true}));
  if (dialog.returnValue !== "forget") return;
  const next = row.nextElementSibling ?? row.previousElementSibling;
  const focus = next?.dataset.id;
  try {
    row.querySelectorAll("button").forEach((button) => (button.disabled = true));
    await call(`/v1/memories/${fact.id}`, {method: "DELETE"});
    say("Forgotten.");
    await refresh();
    ($("list").querySelector(`[data-id="${focus}"] button`) ?? $("facts")).focus();
  } catch (error) {
    say(error.message, true);
    await refresh();
  }
}

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

function factsOf(form) {
  const [question, answer] = [$("add-question").value.trim(), $("add-answer").value.trim()];
  const many = lines($("add-lines").value).map((line, number) => {
    try {
      return JSON.parse(line);
    } catch {
      throw new Error(`Line ${number + 1} is not JSON; write it like {"question": "…", "answer": "…"}.`);
    }
  });
  if (Boolean(question) !== Boolean(answer)) throw new Error("A fact needs a question and its answer.");
  if (!question && !many.length) throw new Error("Write a question and its answer.");
  return question ? [{question, answer, also: lines($("add-also").value)}, ...many] : many;
}

async function add(event) {
  event.preventDefault();
  try {
    const facts = factsOf();
    const {results} = await json("/v1/memories", {method: "POST", body: {facts}});
    event.target.reset();
    $("add-question").focus();
    say(results.length === 1 ? "The fact is being tuned." : `${results.length} facts are being tuned.`);
    await watch();
    const after = await Promise.all(results.slice(0, 100).map(({id}) => json(`/v1/memories/${id}`).catch(() => null)));
    const failed = after.filter((fact) => fact?.state === "failed").length;
    if (failed) say(`${failed} of ${results.length} do not hold; the list says why.`, true);
    else say(results.length === 1 ? "The fact holds." : `All ${results.length} facts hold.`);
  } catch (error) {
    say(error.message, true);
  }
}

function toggleAdd(open) {
  $("add").hidden = !open;
  $("add-toggle").setAttribute("aria-expanded", String(open));
  (open ? $("add-question") : $("add-toggle")).focus();
}

// ---- Wiring ----

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (question) ask(question);
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("stop").hidden = true;
  $("question").focus();
});
$("add-toggle").addEventListener("click", () => toggleAdd($("add").hidden));
$("add-close").addEventListener("click", () => toggleAdd(false));
$("add").addEventListener("submit", add);
$("add").addEventListener("keydown", (event) => event.key === "Escape" && toggleAdd(false));
$("search").addEventListener("submit", (event) => event.preventDefault());
let typed;
$("search-text").addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(() => {
    Object.assign(shown, {search: $("search-text").value.trim(), limit: PAGE});
    say("");
    refresh().catch((error) => say(error.message, true));
  }, 200);
});
$("more").addEventListener("click", () => {
  shown.limit = Math.min(shown.limit + PAGE, 1000);
  refresh().catch((error) => say(error.message, true));
});
let width = 0;
new ResizeObserver(([{contentRect}]) => {
  if (seen && contentRect.width !== width) showPlot(seen);
  width = contentRect.width;
}).observe($("plot"));
watch().catch((error) => say(error.message, true));
