"""The arithmetic of what training takes agrees with the programs that train, and with itself."""

import dataclasses
import math

import helpers
import jax
import pytest

from experiments import compute_requirements
from experiments import compute_requirements_arithmetic as arithmetic
from experiments.compute_requirements_arithmetic import Comparison, Plan
from experiments.shared import flops
from lamini_jax.config import LLAMA3_8B, large
from lamini_jax.errors import UserError
from lamini_jax.training import LoraMethod

COUNT = 8


@pytest.fixture(scope="module", params=["all", "answer"])
def config(request):
    return helpers.replace(helpers.CONFIG, memory={"positions": request.param})


@pytest.fixture(scope="module")
def steps(config, model):
    """Steps that are traced and not compiled."""
    return compute_requirements.timed_steps(config, model, helpers.some_facts(COUNT))


@pytest.mark.parametrize("method", compute_requirements.METHODS)
def test_counted_flops_are_those_of_the_program(config, steps, method):
    step, depth = steps[method], (1, config.memory.num_layers)
    counted = COUNT * flops.per_fact(config, method, step.tokens, step.answer_tokens, depth)
    program = step.lowered.cost_analysis()["flops"]
    # What is no product (norms, softmax, the optimizer) weighs little, and adds; shorter answers have fewer logits.
    assert 0.98 * counted < program < 1.12 * counted


def test_a_step_costs_the_same_for_any_number_of_experts(steps):
    few, many = (steps[name].lowered.cost_analysis()["flops"] for name in ("few", "mome"))
    assert helpers.CONFIG.memory.num_experts != compute_requirements.FEW_EXPERTS
    assert few == pytest.approx(many, rel=0.001)


def test_a_second_forward_pass_costs_as_much_as_the_first():
    config, shape = helpers.CONFIG, (32, 8)
    once, twice = (flops.per_fact(config, "mome", *shape, remat=remat) for remat in (False, True))
    unembedding = 4 * shape[1] * helpers.BACKBONE.embed_dim * helpers.BACKBONE.vocab_size
    assert 1 / 3 < (twice - once) / (once - unembedding) < 2 / 3  # of three products, or less in the first layer


def test_trained_parameters(model):
    config = helpers.CONFIG
    adapters = LoraMethod.create(config, model, helpers.FACTS).fresh()
    assert flops.trained_parameters(config, "full") == sum(x.size for x in jax.tree.leaves(model.params))
    assert flops.trained_parameters(config, "lora") == sum(x.size for x in jax.tree.leaves(adapters))
    assert flops.trained_parameters(large(LLAMA3_8B, 2**20), "full") == 8_030_261_248  # Meta's count


def test_requirements():
    plan = Plan()
    need = arithmetic.requirements(plan)
    more = arithmetic.requirements(dataclasses.replace(plan, accelerators=2 * plan.accelerators))
    assert more["days"] == pytest.approx(need["days"] / 2) and more["dollars"] == pytest.approx(need["dollars"])
    assert more["megawatts"] == 2 * need["megawatts"] == 700
    exact = dataclasses.replace(plan, accelerators=need["accelerators_for_days"])
    assert plan.days * 0.9999 < arithmetic.requirements(exact)["days"] <= plan.days
    one = arithmetic.requirements(dataclasses.replace(plan, epochs=1))
    for name in ("flops", "days", "gigawatt_hours", "dollars", "tonnes_of_co2", "homes"):
        assert one[name] == pytest.approx(need[name] / 100), name
    assert need["gigawatt_hours"] == pytest.approx(350 * 24 * need["days"] / 1000)
    assert need["dollars"] == pytest.approx(need["gigawatt_hours"] * 1e6 * 0.09)
    assert need["tonnes_of_co2"] / need["homes"] == pytest.approx(5.14, rel=0.001)  # the EPA's figure for a home


@pytest.mark.parametrize(
    "ratios, verdict",
    [((1, 1.09, 0.92), "reproduced"), ((1.2, 0.75), "reproduced in part"), ((1.6, 0.5, 560), "not reproduced")],
)
def test_verdicts_follow_from_the_ratios(ratios, verdict):
    for ratio in ratios:
        claim = arithmetic.claim(Comparison("facts", 100, 100 * ratio, "counted", "for a reason"))
        assert claim.verdict == verdict and ("for a reason" in claim.measured) is (verdict != "reproduced")


@pytest.mark.parametrize(
    "flops_ratio, seconds, expected",
    [(1.0, 1.0, "reproduced"), (1.0, 1.4, "reproduced in part"), (2.0, 1.4, "not reproduced")],
)
def test_claims_follow_from_the_steps(flops_ratio, seconds, expected):
    cheap, dear = {"seconds": 0.001, "flops": 1e6}, {"seconds": 0.002, "flops": 2e6}
    steps = {"methods": {"full": dear, "lora": dear, "mome": cheap}, "num_experts": 2**20, "few_experts": 2**14}
    steps |= {"flops_over_few": flops_ratio, "seconds_over_few": seconds, "flops_once": 1e6}
    results = {"paper": [], "steps": steps}
    assert [claim.verdict for claim in compute_requirements.claims(results)] == [expected, "reproduced"]
    steps["methods"]["mome"] = dear
    assert compute_requirements.claims(results)[1].verdict == "not reproduced"


def test_a_plan_of_ones_own():
    mine = compute_requirements.plan({"parameters": 8e9, "tokens": None, "epochs": 1.0})
    assert (mine.parameters, mine.tokens, mine.epochs, mine.mfu) == (8e9, 160e9, 1.0, Plan().mfu)
    assert compute_requirements.plan({"parameters": 8e9, "tokens": 15e12}).tokens == 15e12
    for name, value, told in (("mfu", 1.5, "at most 1"), ("epochs", 0.0, "positive"), ("days", math.nan, "positive")):
        with pytest.raises(UserError, match=f"--{name}={value:g}: must be .*{told}"):
            compute_requirements.plan({name: value})


def test_bad_input(tmp_path):
    flags = f"--workdir={tmp_path / 'run'}", "--config.tuning.batch_size=1000"
    result = helpers.call("experiments.compute_requirements", *flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "--config.tuning.batch_size=1000: too many facts" in result.stderr and not (tmp_path / "run").exists()
