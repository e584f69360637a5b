"""The command line: every command, as people and as programs read it; errors are one line and exit with 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import reattend
import torch
from PIL import Image
from reattend.command_line import listing
from reattend.evaluation.suites.registry import registry as suites
from reattend.recipes.kit.denoisers import image_layers
from reattend.zoo import packaged
from text_pipelines import fill_pipe, image_pipe, llama, text_pipe, tokenizer, word_tokenizer  # noqa: F401

PROMPT = "the red dog sat on a big house and the small cat ran in the garden"
TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"


def one_line_error(result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    *bars, line = result.stderr.strip().splitlines()
    assert all("%|" in bar for bar in bars), "nothing but progress bars beside the error"
    assert line.startswith("error: ")
    return line


def test_list_and_show(call):
    found = json.loads(call("list", "--json").stdout)
    assert [item["name"] for item in found] == list(reattend.list_recipes())
    assert {"does", "paper", "arxiv", "families", "kinds", "cost"} <= set(found[0])
    assert all(info.costs for info in reattend.list_recipes().values()), "the words of cost are explained"
    assert "streaming" in call("list").stdout
    only = json.loads(call("list", "--family", "sparsity", "--kind", "llm", "--json").stdout)
    assert only and all("sparsity" in i["families"] and "llm" in i["kinds"] for i in only)
    shown = json.loads(call("show", "streaming", "--json").stdout)
    window = next(p for p in shown["parameters"] if p["name"] == "window")
    assert window["default"] == 1020 and window["help"] and window["schema"]["minimum"] == 1
    text = call("show", "streaming").stdout
    assert "arxiv.org/abs/2309.17453" in text and "window" in text
    assert "cost: decode (more work at every step, but no further pass)" in " ".join(call("show", "vsf").stdout.split())


def test_list_answers_by_problem_and_show_says_what_to_try(call):
    listed = call("list").stdout
    assert listed.index("my instruction is overlooked") < listed.index("  emphasise") < listed.index("the prompt is too long")
    assert "measured: highlight followed" in " ".join(listed.split()) and max(map(len, listed.splitlines())) <= 80
    shown = " ".join(call("show", "emphasise").stdout.split())
    assert "try first: alpha=0.3; then compare: alpha 0.55, 0.3, 0.09" in shown and "when my instruction is overlooked" in shown
    data = json.loads(call("show", "emphasise", "--json").stdout)
    assert data["measured"]["did"] and data["try_first"] == {"alpha": 0.3}


def test_every_recipe_can_be_shown(call):
    for name in reattend.list_recipes():
        assert json.loads(call("show", name, "--json").stdout)["name"] == name
        assert call("show", name).exit_code == 0


def test_help_and_version(call):
    assert call("--version").stdout == f"reattend {reattend.__version__}\n"
    text = call("--help").stdout
    for command in ("list", "show", "sites", "run", "compare", "analyse", "profile", "demo"):
        assert command in text
        assert "--json" in call(command, "--help").stdout


def test_choices_are_shown_and_others_refused_in_one_line(call):
    found = reattend.list_recipes()
    served = {kind for info in found.values() for kind in info.kinds} | {cls.kind for cls in suites().values()}
    assert tuple(sorted(served)) == listing.KINDS
    assert tuple(sorted({family for info in found.values() for family in info.families})) == listing.FAMILIES
    shown = call("list", "--help").stdout
    assert "|".join(listing.KINDS) in shown and "|".join(listing.FAMILIES) in shown
    assert "--kind must be one of diffusion, llm, lvlm, vision" in one_line_error(call("list", "--kind", "speech"))


def test_the_shell_can_complete(call):
    assert "--install-completion" in call("--help").stdout
    asked = {"_REATTEND_COMPLETE": "complete_bash", "COMP_WORDS": "reattend list --kind l", "COMP_CWORD": "3"}
    program = "from reattend.__main__ import app; app(prog_name='reattend')"
    said = subprocess.run([sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True).stdout
    assert said.split() == ["llm", "lvlm"]


def test_in_a_process_of_its_own_without_diffusers():
    program = (
        "import runpy, sys; sys.argv = ['reattend', 'list', '--json']\n"
        "try: runpy.run_module('reattend', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules, 'list must stay light'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "streaming" in [item["name"] for item in json.loads(done.stdout)]
    done = subprocess.run([sys.executable, "-m", "reattend", "show", "streeming"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown recipe 'streeming': did you mean 'streaming'?\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["show", "streeming"], "did you mean 'streaming'"),
        (["list", "--family", "magic"], "--family must be one of"),
        (["list", "--kind", "magic"], "--kind must be one of"),
        (["run", "nowhere", "--text", "a"], "at least one recipe"),
        (["run", "nowhere", "-r", "streaming"], "give an input"),
        (["run", "nowhere", "-r", "streaming", "-t", "@missing.txt"], "no text file at 'missing.txt'"),
        (["run", "nowhere", "-r", "streaming", "-i", "missing.png"], "no picture at 'missing.png'"),
        (["run", "nowhere", "-r", "missing.yaml", "-t", "a"], "no recipe file at 'missing.yaml'"),
        (["run", "nowhere", "-r", "streaming", "--set", "window", "-t", "a"], "--set takes key=value"),
        (["run", "nowhere", "-r", "streaming", "--set", "window=0", "-t", "a"], "window"),
        (["run", "nowhere", "-r", "streaming", "--set", "windw=5", "-t", "a"], "not a parameter of 'streaming'"),
        (["run", "nowhere", "-r", "streaming", "--set", "window={", "-t", "a"], "is not a YAML value"),
        (["compare", "nowhere", "-r", "streaming", "-r", "act", "--set", "window=5", "-t", "a"], "write name.key=value"),
        (["compare", "/no/such/folder", "-r", "streaming", "-t", "a"], "/no/such/folder"),
        (["sites", "not a name"], "neither a folder, a hub id"),
        (["profile", "streaming", "nowhere", "--out", "x.safetensors"], "has no profiling step"),
    ],
)
def test_bad_input_is_one_line_and_exits_with_2(call, arguments, words):
    assert words in one_line_error(call(*arguments))


def test_debug_shows_the_traceback(call):
    for arguments in (("--debug", "show", "streeming"), ("show", "streeming", "--debug")):
        assert isinstance(call(*arguments).exception, reattend.ReattendError)


def test_what_nobody_foresaw_is_one_line_too(call, monkeypatch):
    import reattend.recipes

    monkeypatch.setattr(reattend.recipes, "list_recipes", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in one_line_error(call("list"), code=1)


def test_sites_reads_configs_only(call, saved, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    data = json.loads(call("sites", saved, "--json").stdout)
    assert data["model"] == "LlamaForCausalLM"
    assert [(s["name"], s["layer"], s["causal"], s["num_kv_heads"]) for s in data["sites"]] == [
        ("model.layers.0.self_attn", 0, True, 2),
        ("model.layers.1.self_attn", 1, True, 2),
    ]
    text = call("sites", saved).stdout
    assert "2 attention sites (read from its config, no weights loaded)" in text
    assert "0-1     decoder" in text and "model.layers.*.self_attn" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
def test_sites_of_a_denoiser_say_how_recipes_number_its_layers(call):
    *_, last = call("sites", "zoo:shapes-sd").stdout.splitlines()
    assert last.endswith("(layers=, heads=): denoiser.down 0-2, denoiser.mid 3, denoiser.up 4-9")
    sites = reattend.sites(reattend.zoo.load("shapes-sd"))
    assert {n: t[0].stack for n, t in image_layers(sites).items()} == dict(
        enumerate(["denoiser.down"] * 3 + ["denoiser.mid"] + ["denoiser.up"] * 6)
    )


def test_sites_of_a_packaged_model_read_no_weights(call, smollm2, monkeypatch):
    monkeypatch.setitem(packaged.PACKAGED, "smollm2", lambda: 1 / 0)
    sites = json.loads(call("sites", "smollm2", "--json").stdout)["sites"]
    assert sites == reattend.sites(smollm2[0]).rows()


def test_sites_of_a_model_that_does_not_come_along(call):
    assert "the weights of smol-llava do not come along yet" in one_line_error(call("sites", "zoo:smol-llava"))


def test_sites_of_a_diffusers_pipeline(call, image_pipe, tmp_path):  # noqa: F811
    image_pipe.save_pretrained(tmp_path / "pipe")
    for folder in ("pipe", "pipe/unet"):
        data = json.loads(call("sites", str(tmp_path / folder), "--json").stdout)
        assert data["model"] == "UNet2DConditionModel" and len(data["sites"]) > 2


def test_run(call, saved, text_pipe, tokenizer):  # noqa: F811
    options = ["--recipe", "streaming", "--set", "sinks=1", "--set", "window=3", "--text", PROMPT, "--max-new-tokens", "6"]
    result = call("run", saved, *options, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    with reattend.apply(text_pipe, "streaming", sinks=1, window=3):
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        new = text_pipe.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert data["output"] == tokenizer.decode(new, skip_special_tokens=True)
    assert data["stats"]["streaming"]["model.layers.0.self_attn"] == 6
    assert data["recipes"] == [{"name": "streaming", "version": 1, "sinks": 1, "window": 3}]
    assert call("run", saved, *options).stdout.strip() == data["output"].strip()


def test_recipes_from_files_and_text_from_files(call, saved, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: streaming\nsinks: 1\nwindow: 3\n")
    (tmp_path / "prompt.txt").write_text(PROMPT)
    by_file = call("run", saved, "-r", str(tmp_path / "mine.yaml"), "-t", f"@{tmp_path / 'prompt.txt'}", "--json")
    by_name = call("run", saved, "-r", "streaming", "--set", "sinks=1", "--set", "window=3", "-t", PROMPT, "--json")
    assert json.loads(by_file.stdout) == json.loads(by_name.stdout)
    bad = call("run", saved, "-r", str(tmp_path / "mine.yaml"), "--set", "window=3", "-t", PROMPT)
    assert "change the parameters" in one_line_error(bad)


def test_compare(call, saved, tmp_path):
    page = tmp_path / "report.html"
    options = ["-r", "streaming", "--set", "sinks=1", "--set", "window=3", "-t", PROMPT, "--max-new-tokens", "5"]
    result = call("compare", saved, *options, "--json", "--html", str(page))
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["metrics"]["identical"] is False and len(data["before"]["tokens"]) == 5
    assert data["recipes"][0]["parameters"]["window"] == 3
    assert "<!doctype html>" in page.read_text()
    shown = call("compare", saved, *options)
    assert "edits applied 10 times" in " ".join(shown.stdout.split())


def test_chat_templates_are_used_unless_raw(call, tmp_path, llama):  # noqa: F811
    folder = tmp_path / "chat"
    llama.save_pretrained(folder)
    word_tokenizer(template=TEMPLATE).save_pretrained(folder)
    options = ["-r", "streaming", "--set", "window=2", "--set", "sinks=1", "-t", PROMPT, "--max-new-tokens", "3", "--json"]
    templated = json.loads(call("compare", str(folder), *options).stdout)
    raw = json.loads(call("compare", str(folder), *options, "--raw").stdout)
    assert templated["request"]["prompt_tokens"] == raw["request"]["prompt_tokens"] + 2
    assert templated["request"]["prompt"].startswith("<s>") and raw["request"]["prompt"].startswith("the")


def test_a_recipe_that_does_not_fit(call, tmp_path, fill_pipe):  # noqa: F811
    fill_pipe.model.save_pretrained(tmp_path / "bert")
    fill_pipe.tokenizer.save_pretrained(tmp_path / "bert")
    result = call("compare", str(tmp_path / "bert"), "-r", "streaming", "-t", "the <mask> dog")
    assert "needs a language model with a causal decoder" in one_line_error(result)


def test_a_recipe_that_never_acts_is_a_warning(call, saved):
    result = call("run", saved, "-r", "streaming", "-t", PROMPT, "--max-new-tokens", "2")
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if line.startswith("warning: recipe 'streaming' never acted")]


def test_run_writes_pictures(call, image_pipe, tmp_path, monkeypatch):  # noqa: F811
    from reattend.comparison import arguments, loading
    from reattend.hooks import Edits, Support
    from reattend.interventions import MixValue
    from reattend.recipes import Info, Recipe

    class Soften(Recipe):
        info = Info("Softens.", "None", 2026, "0000.00000", ("calibration",), ("diffusion",), "free")

        def supports(self, sites):
            return Support(True)

        def plan(self, sites):
            return [Edits(sites.stack("denoiser").kind("self"), lambda call: MixValue(strength=0.5), "soften")]

    monkeypatch.setattr(loading, "load", lambda *_, **__: image_pipe)
    monkeypatch.setattr(arguments, "recipes_of", lambda *_: [Soften()])
    out = tmp_path / "x.png"
    result = call("run", "pipe", "-r", "soften", "-t", "the red dog", "--steps", "1", "-o", str(out), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["output"] == [str(out)] and sum(data["stats"]["soften"].values()) > 0
    assert Image.open(out).size[0] > 0


def test_profile_writes_a_file(call, saved, tmp_path, monkeypatch):
    from reattend.recipes import Profile, recipe_class

    def learn(cls, model, words, *, rounds=1):
        return Profile("streaming", {"class": type(model).__name__}, {"scores": torch.ones(2, rounds)}, {"rounds": rounds})

    monkeypatch.setattr(recipe_class("streaming"), "profile", classmethod(learn))
    out = tmp_path / "p.safetensors"
    result = call("profile", "streaming", saved, "--out", str(out), "--set", "rounds=3", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["tensors"] == {"scores": [2, 3]} and data["model"] == {"class": "LlamaForCausalLM"}
    assert Profile.load(out).facts == {"rounds": 3}


def test_analyse(call, saved, tmp_path):
    found = json.loads(call("analyse", saved, "--text", PROMPT, "--length", "12", "--json").stdout)
    assert found["tokens"] == [12] and found["layers"] == [0, 1] and found["recipes"] == []
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{PROMPT}\n\n  \nthe big red dog\nran\n")
    steered = json.loads(
        call(
            "analyse", saved, "--file", str(texts), "-r", "streaming", "--set", "sinks=1", "--set", "window=3", "--json"
        ).stdout
    )
    assert steered["tokens"] == [len(PROMPT.split()), 5] and steered["recipes"] == ["streaming"]
    assert "sink rate" in call("analyse", saved, "--text", f"@{texts}").stdout
    assert "not both" in one_line_error(call("analyse", saved, "--text", "a dog", "--file", str(texts)))
    assert "no text file" in one_line_error(call("analyse", saved, "--file", "nowhere.txt"))
    assert "has: decoder" in one_line_error(call("analyse", saved, "--text", PROMPT, "--stack", "vision"))
