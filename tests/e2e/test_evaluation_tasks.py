"""The tasks of docs/evaluation_tasks.md on made-up rows in their formats: what right and wrong answers score, and all
recipes on a small diffusion model."""

import json
import re

import pytest
from omegaconf import OmegaConf

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.model import LM

from llamafactory_ddm.cli.eval import main
from llamafactory_ddm.harness.keys import EvalKeys
from llamafactory_ddm.harness.local_data import task_manager
from llamafactory_ddm.harness.run import evaluate
from support.cli import ROOT, run
from support.harness import made_up_rows, random_model

TASKS = ROOT / "examples" / "eval" / "tasks"
# For each task, a right answer and a wrong one to a document, and what is scored.
NUMBER = (lambda doc: f" {doc['result']}", lambda doc: f" {doc['result']}1", "accuracy")
LETTER = (lambda doc: " (A)", lambda doc: " (B)", "accuracy")
ALIAS = (lambda doc: f" the {doc['answer']['value']} box", lambda doc: " a cat", "contained")
BOXED = (lambda doc: f" {doc['solution']}", lambda doc: " $\\boxed{0}$", "equivalent")
CODE = (lambda doc: doc["canonical_solution"], lambda doc: "    return None\n", "pass@1")
ANSWERS = {
    "gsm8k_finetuned": (lambda doc: doc["answer"], lambda doc: "3", "accuracy"),
    "humaneval_sandbox": CODE,
    "humaneval_single_line_sandbox": CODE,
    "math_cot": BOXED,
    "mbpp_sandbox": (lambda doc: doc["code"] + "\n", lambda doc: "import sys\nsys.exit(0)\n", "pass@1"),
    "rocstories_infilling": (lambda doc: doc["InputSentence3"], lambda doc: "?", "rouge-avg"),
}
ANSWERS |= {f"mawps{each}": NUMBER for each in ("", "_few_shot", "_cot", "_sampled", "_cot_sampled")}
ANSWERS |= {f"sat_math{each}": LETTER for each in ("", "_few_shot", "_cot", "_sampled", "_cot_sampled")}
ANSWERS |= {f"triviaqa_{each}": ALIAS for each in ("contained", "few_shot", "sampled")}
# Tasks of lm-evaluation-harness under their names there.
OF_THE_HARNESS = (
    "hellaswag,winogrande,social_iqa,piqa,lambada_openai,triviaqa,gsm8k,bbh_cot_fewshot_boolean_expressions,"
    "hendrycks_math_algebra,agieval_sat_math"
)
ELSEWHERE = "tiny_"  # test_evaluation.py, test_comparisons.py
RECIPES = sorted(path for path in (ROOT / "examples" / "eval").glob("*.yaml") if not path.name.startswith(ELSEWHERE))
SMALL = ["max_samples=1", "likelihood_samples=16", "diffusion_steps=2", "max_new_tokens=4", "infer_dtype=float32"]


class Writer(LM):
    """Answers each document with its right or wrong text: number `choose(count)` of its `ANSWERS`."""

    def __init__(self, choose):
        super().__init__()
        self.choose, self.contexts = choose, {}

    def generate_until(self, requests, disable_tqdm=False):
        texts = []
        for number, request in enumerate(requests):
            name = re.sub("^math_cot_.*", "math_cot", request.task_name)
            self.contexts.setdefault(name, request.args[0])
            texts.append(ANSWERS[name][self.choose(number)](request.doc))
        return texts

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return made_up_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def loaded(rows):
    """Each task of examples/eval/tasks, loaded once."""
    manager = task_manager(list(ANSWERS), str(TASKS), str(rows))
    found = {name: manager.load([name]) for name in ANSWERS}
    return {name: each["groups"][name] if each.get("groups") else each["tasks"][name] for name, each in found.items()}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    """Work in the repository's root, and leave out the harness's list of installed packages, which takes seconds."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def scores(tasks, writer):
    """Return the scores by metric and filter of each task, on its made-up rows."""
    done = lm_eval.simple_evaluate(
        model=writer,
        tasks=tasks,
        task_manager=task_manager([], None, None),
        limit=2,
        confirm_run_unsafe_code=True,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {**done["results"], **done.get("groups", {})}


@pytest.fixture(scope="module")
def written(loaded):
    """The scores of right answers and of wrong ones, with the prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        writers = [Writer(lambda _: 0), Writer(lambda _: 1)]
        return [scores(list(loaded.values()), writer) for writer in writers], writers[0].contexts


def test_every_task_is_here():
    texts = [path.read_text() for path in TASKS.glob("*.yaml")]
    named = {name for text in texts for name in re.findall(r"^(?:task|group): (\S+)$", text, re.MULTILINE)}
    subjects = {name for name in named if name.startswith(("math_cot_", "tiny_"))}
    assert named - subjects == set(ANSWERS)


def test_a_few_tasks_score_right_and_wrong_answers(rows):
    """The others are slow to load."""
    names = ("mawps_sampled", "humaneval_sandbox")
    loaded = task_manager(list(names), str(TASKS), str(rows)).load(list(names))["tasks"].values()
    for choice in (0, 1):
        results = scores(list(loaded), Writer(lambda _, choice=choice: choice))
        assert results["mawps_sampled"]["accuracy,majority@8"] == 1 - choice
        assert results["humaneval_sandbox"]["pass@1,none"] == 1 - choice


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_right_and_wrong_answers(name, written):
    metric = ANSWERS[name][2]
    best = 100 if metric == "rouge-avg" else 1
    for results, expected in zip(written[0], (best, 0), strict=True):
        found = {key: value for key, value in results[name].items() if key.startswith(f"{metric},")}
        assert found and all(value == pytest.approx(expected) for value in found.values()), found


@pytest.mark.slow
def test_half_of_the_samples(loaded):
    """Of eight samples, four are wrong in the same way, the first among them; any right one is a hit."""
    found = scores([loaded["mawps_sampled"]], Writer(lambda number: 1 - number % 2))["mawps_sampled"]
    assert {key: found[f"accuracy,{key}"] for key in ("first", "majority@8", "hit@8")} == {
        "first": 0.0,
        "majority@8": 0.0,
        "hit@8": 1.0,
    }


@pytest.mark.slow
def test_examples_do_not_depend_on_the_number_of_processes(loaded):
    task, prompts = loaded["sat_math_few_shot"], []
    for rank, world_size in ((0, 1), (1, 2)):
        task.set_fewshot_seed(1234)
        task.build_all_requests(rank=rank, world_size=world_size)
        prompts.append({request.doc_id: request.args[0] for request in task.instances})
        assert all(request.args[0].count(request.doc["query"]) == 1 for request in task.instances)
    assert prompts[1] == {number: prompts[0][number] for number in range(1, 9, 2)}


@pytest.mark.slow
def test_prompts_show_what_they_should(written):
    prompts = written[1]
    assert prompts["mawps"].count("Question:") == 1 and prompts["mawps_few_shot"].count("Question:") == 5
    assert prompts["mawps_cot"].count("The answer is") == 4
    assert prompts["sat_math_cot"].endswith("one letter.")
    assert prompts["sat_math_few_shot"].count("the answer is A") == 4
    assert prompts["math_cot"].count("\\boxed") == 4 and prompts["mbpp_sandbox"].count("[DONE]") == 3
    assert prompts["rocstories_infilling"] == (
        "Anna wanted some apples. Anna went to the market.<|infill|> Anna bought three of them. Anna was happy."
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_recipe_runs(recipe, rows, tmp_path, request, capsys):
    """The whole command in this process; of BBH one task, as the others differ in their data alone."""
    keys = OmegaConf.to_container(OmegaConf.load(recipe))
    model = request.getfixturevalue("finetuned") if "template" in keys else random_model(tmp_path / "model", 512)
    tasks = keys["task"].replace(",bbh", ",bbh_cot_fewshot_boolean_expressions")
    words = [
        f"model_name_or_path={model}",
        f"task={tasks}",
        f"save_dir={tmp_path / 'out'}",
        "block_length=null",
        *SMALL,
    ]
    if isinstance(keys.get("task_data"), dict):
        words += [f"task_data.{name}={rows / name}" for name in keys["task_data"]]
        words += [f"task_data.loubnabnl/humaneval_infilling={rows / 'loubnabnl' / 'humaneval_infilling'}"]
    else:
        words += [f"task_data={rows}"]
    assert main([str(recipe), *words]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in tasks.split(","))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["config"]["model_settings"]["weights"]


@pytest.mark.slow
def test_the_commands_of_the_page(rows, tmp_path):
    """The second is a recipe, which `test_the_recipe_runs` runs with the same keys."""
    page = (ROOT / "docs" / "evaluation_tasks.md").read_text(encoding="utf-8")
    write, evaluate_them = re.search(r"```bash\n(.*?)```", page, re.S)[1].splitlines()
    assert write == "python data/make_task_rows.py saves/task_rows"
    run(tmp_path / "rows", program="data/make_task_rows.py")
    files = sorted(path.relative_to(rows) for path in rows.rglob("*") if path.is_file())
    assert files and all((tmp_path / "rows" / file).read_bytes() == (rows / file).read_bytes() for file in files)
    program, command, recipe, *words = evaluate_them.split()
    assert (program, command) == ("llamafactory-ddm", "eval") and ROOT / recipe in RECIPES
    assert words == ["model_name_or_path=saves/tiny_gpt2/full/ddm", "task_data=saves/task_rows"]


@pytest.mark.slow
def test_tasks_of_the_harness_run_on_made_up_rows(rows, tmp_path):
    model = random_model(tmp_path / "model", 512)
    keys = EvalKeys(
        model_name_or_path=str(model),
        task=OF_THE_HARNESS,
        task_data=str(rows),
        max_samples=1,
        likelihood_samples=16,
        max_new_tokens=4,
    )
    results = evaluate(keys, {"diffusion_steps": 2})
    assert results["results"].keys() == set(OF_THE_HARNESS.split(","))
    assert results["samples"]["piqa"][0]["doc"]["sol1"] == "Put the apples in a bag."


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"task": "mbpp_sandbox"}, "run_generated_code"),
        (
            {"task": "rocstories_infilling", "template": "diffullama"},
            "task: rocstories_infilling.*template: diffullama",
        ),
    ],
)
def test_what_a_task_needs_is_known_before_the_model_is_loaded(keys, error, rows):
    with pytest.raises(ValueError, match=error):
        evaluate(EvalKeys(model_name_or_path="absent", task_dir=str(TASKS), task_data=str(rows), **keys), {})


def test_the_page_lists_every_task_and_its_times_follow_from_its_numbers():
    page = (ROOT / "docs" / "evaluation_tasks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {name for name, *_ in rows} >= set(ANSWERS)
    for name, documents, passes, tokens, billions, minutes in rows:
        flops = 2 * float(billions) * 1e9 * int(documents) * int(passes) * int(tokens)
        assert float(minutes) == pytest.approx(flops / (0.4 * 989e12) / 60, abs=0.05), name
    for recipe in RECIPES:
        named = OmegaConf.load(recipe)["task"].split(",")
        assert recipe.name in page and set(named) <= {name for name, *_ in rows}
