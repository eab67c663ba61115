// The plot of what the scope sees: how near a question is to the nearest facts, and from where on one of them answers.

const NAMESPACE = "http://www.w3.org/2000/svg";
const ROW = 40; // pixels
const TOP = 24;

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const number = (score) => (score === null ? "the same words" : score.toFixed(1).replace("-", "−"));

// What the plot says, in words.
export function summaryOf({threshold, results, fact}) {
  if (!results.length) return "No facts are stored yet.";
  const [best] = results;
  const which = `“${best.question}”`;
  if (!fact) return `The nearest fact is ${which}, with a score of ${number(best.score)}; one answers from ${number(threshold)} on.`;
  if (best.score === null) return `The question is ${which}, word for word.`;
  return `The question asks for ${which}: its score of ${number(best.score)} reaches ${number(threshold)}.`;
}

// An SVG of this width. A score without end, of the same words, is drawn at the right edge.
export function drawPlot({threshold, results}, width) {
  const finite = results.map(({score}) => score).filter((score) => score !== null);
  const [low, high] = [Math.min(threshold, ...finite) - 1, Math.max(threshold, ...finite) + 2];
  const [left, right] = [4, Math.max(width - 52, 120)];
  const place = (score) => (score === null ? right : left + ((score - low) / (high - low)) * (right - left));
  const height = TOP + results.length * ROW;
  const svg = draw("svg", {class: "plot", viewBox: `0 0 ${width} ${height}`, height, role: "img"});
  svg.append(draw("title", {}, "Scores of the nearest facts"), draw("desc", {}, results
    .map(({question, score}) => `${question}: ${number(score)}`).join("; ")));
  const line = place(threshold);
  const anchor = line > width / 2 ? "end" : "start";
  svg.append(
    draw("line", {class: "threshold", x1: line, x2: line, y1: 2, y2: height - 4}),
    draw("text", {
      class: "threshold-label", x: line + (anchor === "end" ? -6 : 6), y: 11, "text-anchor": anchor,
    }, `answers from ${number(threshold)} on`));
  const letters = Math.max(12, Math.floor((width - 8) / 7.8));
  results.forEach(({wording, score, fires}, index) => {
    const y = TOP + index * ROW;
    const text = wording.length > letters ? `${wording.slice(0, letters - 1)}…` : wording;
    const x = place(score);
    svg.append(draw("g", {class: fires ? "fires" : ""},
      draw("text", {class: "label", x: left, y: y + 13}, text),
      draw("line", {class: "track", x1: left, x2: right, y1: y + 26, y2: y + 26}),
      draw("line", {class: "stem", x1: left, x2: x, y1: y + 26, y2: y + 26}),
      draw("circle", {class: "dot", cx: x, cy: y + 26, r: fires ? 6 : 4.5}),
      draw("text", {class: "faint", x: x + 11, y: y + 30}, score === null ? "same" : number(score))));
  });
  return svg;
}
