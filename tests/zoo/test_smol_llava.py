"""smol-llava's two stages around a tiny language model: they learn, go on where they stopped, and leave the language model alone."""

from __future__ import annotations

import pytest
import reattend
import torch
from reattend.zoo import smol_llava
from reattend.zoo.smol_llava import IMAGE, PATCH, SIDE, build, build_processor, put, trained
from reattend.zoo.train import cards
from reattend.zoo.train import smol_llava as script
from reattend.zoo.train.ahead import Ahead, processes
from reattend.zoo.train.loop import Loop
from reattend.zoo.train.smol_lessons import Chats, ChatTeacher, Patches
from reattend.zoo.train.smol_stages import Meanings, Place, Size, learn_to_see, learn_to_talk, prepare, word_ids
from reattend.zoo.worlds.language import DESCRIBE, WORDS
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE]


def chat_tokenizer():
    """One token per word of the world, in SmolLM2's form of a chat; without a padding token, as some versions read one from GGUF."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, "user", "assistant", *WORDS])}, "<|endoftext|>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def language():
    """(language model, tokenizer), instead of SmolLM2."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def made(language):
    torch.manual_seed(1)
    return build(*language)


def test_the_language_model_is_the_packages_and_stays_as_it_is(language, tmp_path):
    model = made(language)
    prepare(model, Place(tmp_path))
    learn_to_talk(model, language[1], Place(tmp_path), Size(2, 4))
    own = model.model.language_model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in language[0].model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned and all(name.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for name in learned)


def test_both_stages_learn(language, tmp_path, monkeypatch):
    """The same lesson again and again: a few steps, at the small rates of a training's beginning, must show."""
    model, place = made(language), Place(tmp_path)
    prepare(model, place)
    for kind in (Patches(8), Chats(language[1], 6, 0)):
        lesson = kind(0)
        monkeypatch.setattr(type(kind), "__call__", lambda self, step, lesson=lesson: lesson)
    seen = losses(lambda: learn_to_see(model, language[1], place, Size(20, 8)))
    told = losses(lambda: learn_to_talk(model, language[1], place, Size(20, 6)))
    for found, names, less in ((seen, ("shape", "colour"), 0.8), (told, ("describe", "answer"), 0.95)):
        first, last = (sum(one[name] for name in names) for one in (found[0], found[-1]))
        assert last < less * first, (names, first, last)


def losses(stage) -> list[dict[str, float]]:
    """What each step of a stage lost."""
    found, step = [], Loop._step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Loop, "_step", lambda self: found.append(step(self)) or found[-1])
        stage()
    return found


class Cut(Exception):
    pass


def test_a_training_in_pieces_equals_the_whole(language, tmp_path):
    sizes = Size(5, 4, save_every=2), Size(6, 4, save_every=2)

    def go(folder, steps: int | None = None):
        """A training in a process of its own, as it were, that is cut off after so many steps."""
        done, step = [], Loop._step

        def stepped(self):
            if len(done) == steps:
                raise Cut
            done.append(self.step)
            return step(self)

        model = made(language)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Loop, "_step", stepped)
            script.train(model, language[1], Place(folder), *sizes)
        return model, done

    whole, done = go(tmp_path / "whole")
    assert done == [*range(5), *range(6)]
    for steps in (3, 6):  # in the first stage, then in the second
        with pytest.raises(Cut):
            go(tmp_path / "cut", steps)
    pieces, done = go(tmp_path / "cut")
    assert done == [2, 3, 4, 5], "both went on from their checkpoints"
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), pieces.state_dict().values()))
    for part in ("eye/checkpoint.safetensors", "checkpoint.safetensors", f"model/{smol_llava.WEIGHTS}"):
        one, other = (load_file(tmp_path / run / part) for run in ("whole", "cut"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), part
    kept = load_file(tmp_path / "cut" / "checkpoint.safetensors")
    assert {name.split(".")[0] for name in kept} == {"weights", "mean", "state"} and not any(
        "language" in name for name in kept
    )
    files = {file.suffix for file in (tmp_path / "cut").rglob("*") if file.is_file()}
    assert files == {".safetensors", ".json"}


def test_stored_parts_put_together_again(language, tmp_path, monkeypatch):
    model = made(language)
    parts = trained(model)
    assert {value.dtype for value in parts.values()} == {torch.float16}
    torch.manual_seed(2)
    other = build(*language)
    put(other, parts, "file")
    assert all(torch.equal(value, trained(other)[name]) for name, value in parts.items())
    wrong = dict(parts)
    del wrong[next(iter(wrong))]
    with pytest.raises(reattend.ReattendError, match="file does not hold the trained parts"):
        put(other, wrong, "file")
    with pytest.raises(reattend.ReattendError, match="another shape"):
        put(other, {name: value[:1] for name, value in parts.items()}, "file")


def test_a_trained_folder_loads_by_the_zoos_name(language, tmp_path, monkeypatch):
    folder = tmp_path / "smol-llava"
    script.train(made(language), language[1], Place(tmp_path), Size(1, 4), Size(1, 4))
    (tmp_path / "model").rename(folder)
    monkeypatch.setattr(reattend.zoo.loading, "HERE", tmp_path)
    monkeypatch.setattr(smol_llava, "packaged_smollm2", lambda: language)
    model, processor = reattend.zoo.load("smol-llava", dtype=torch.bfloat16)
    assert type(model).__name__ == "LlavaForConditionalGeneration" and type(processor).__name__ == "LlavaProcessor"
    assert model.dtype == torch.bfloat16 and not model.training
    assert "_name_or_path" not in (folder / "config.json").read_text()
    from reattend.comparison.loading import skeleton

    assert reattend.sites(skeleton("zoo:smol-llava")).rows() == reattend.sites(model).rows()


def test_a_finished_run_gets_its_card(language, tmp_path, monkeypatch):
    script.train(made(language), language[1], Place(tmp_path / "run"), Size(1, 4), Size(1, 4))
    monkeypatch.setattr(reattend.zoo.loading, "HERE", tmp_path)
    monkeypatch.setattr(smol_llava, "packaged_smollm2", lambda: language)
    monkeypatch.setattr("sys.argv", ["cards", "smol-llava", "--run", str(tmp_path / "run"), "--count", "1"])
    cards.main()
    there = tmp_path / "smol-llava"
    files = {file.name for file in there.iterdir()}
    assert files == {"config.json", smol_llava.WEIGHTS, "training.json", "baseline.json", "samples.png", "card.md"}
    card = (there / "card.md").read_text(encoding="utf-8")
    assert "(model: 1 steps in 0 minutes, eye: 1 steps in 0 minutes)" in card and "up to twelve things" in card
    assert not {"float16", "bfloat16"} & set((there / "config.json").read_text().split('"'))


def check_processor(model, tokenizer):
    processor = build_processor(tokenizer)
    ids, _ = ChatTeacher(tokenizer).encode([(DESCRIBE, "a red star ."), ("is there a moon in the image ?", "no")])
    image = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": DESCRIBE}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red star ."}]},
        {"role": "user", "content": [{"type": "text", "text": "is there a moon in the image ?"}]},
        {"role": "assistant", "content": "no"},
    ]
    made = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert made["input_ids"][0].tolist() == ids
    assert ids.count(model.config.image_token_id) == (SIDE // PATCH) ** 2
    assert float(made["pixel_values"].max()) == -1.0
    asked = processor.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True, return_dict=True)
    assert ids[: len(asked["input_ids"][0])] == list(asked["input_ids"][0])


def test_the_processor_writes_what_was_taught(language):
    check_processor(made(language), language[1])


@pytest.mark.slow
def test_around_smollm2(smollm2, tmp_path):
    model = build(*smollm2)
    check_processor(model, smollm2[1])
    assert len(set(word_ids(smollm2[1], WORDS).tolist())) == len(WORDS)
    parts = trained(model)
    assert sum(value.numel() * 2 for value in parts.values()) < 8 * 2**20
    place = Place(tmp_path, half=True)
    prepare(model, place)
    (one,) = losses(lambda: learn_to_talk(model, smollm2[1], place, Size(1, 2)))
    assert 0 < one["describe"] < 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_in_pieces(language, tmp_path):
    for steps in (1, 3):
        model, place = made(language), Place(tmp_path, "cuda", processes=2, half=True)
        prepare(model, place)
        eye = learn_to_see(model, language[1], place, Size(steps, 4))
        chats = learn_to_talk(model, language[1], place, Size(steps, 4))
    assert eye.step == chats.step == 3
    assert all(bool(value.isfinite().all()) for value in trained(model).values())


def test_answers_end_and_padding_is_not_an_end(language):
    model = made(language)
    tokenizer = language[1]
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_word_of_several_tokens_is_refused(language):
    assert word_ids(language[1], ("red", "star")).shape == (2,)
    with pytest.raises(reattend.ReattendError, match="'dark red' is 2 tokens"):
        word_ids(language[1], ("star", "dark red"))


def test_meanings_look_at_direction_and_pull_the_size():
    torch.manual_seed(0)
    words = torch.randn(5, 8)
    meanings = Meanings(words[:3], words[3:])
    truths = torch.tensor([2, 3]), torch.tensor([1, 2])  # numbered from 1
    near, far = words[[1, 2]], words[[0, 0]]
    assert meanings(near, truths)["shape"] < meanings(far, truths)["shape"]
    torch.testing.assert_close(meanings(near, truths)["shape"], meanings(7 * near, truths)["shape"])
    sizes = [float(meanings(torch.full((2, 8), meanings.rms * factor), truths)["size"]) for factor in (0.2, 1.0, 5.0)]
    assert sizes[1] < 1e-9 and sizes[0] > 0.1 and sizes[2] > 0.1
    assert {name for name, _ in meanings.named_parameters()} == {"nothing", "gain"}


def test_lessons(language):
    build(*language)  # which gives the tokenizer its padding
    chats = Chats(language[1], batch=32, describing=1)
    seen, ids, labels, describes = chats(0)
    assert seen.dtype == torch.uint8 and seen.shape == (32, 3, SIDE, SIDE) and ids.shape == labels.shape
    assert describes.tolist() == [row % 2 == 0 for row in range(32)] and int(chats(1)[3].sum()) == 8
    taught = labels >= 0
    assert torch.equal(labels[taught], ids[taught]) and bool(taught.any(1).all())
    end = language[1].eos_token_id
    assert ((labels == end).sum(1) == torch.where(describes, 1, 4)).all(), "one answer, or four"
    lengths = [len(language[1].decode(row[row >= 0])) for row in labels[describes]]
    assert max(lengths) > 100, "crowds are described too"
    drawn, shapes, colours = Patches(16)(3)
    assert drawn.shape[0] == 16 and shapes.shape == colours.shape == (16, (SIDE // PATCH) ** 2)
    assert torch.equal(shapes == 0, colours == 0)


def test_lessons_drawn_ahead_are_the_same_in_order():
    here = [Patches(2)(step) for step in range(3, 8)]
    with Ahead(Patches(2), 8, 2) as lessons:
        there = [lessons(step) for step in range(3, 8)]
    assert all(torch.equal(a, b) for one, other in zip(here, there) for a, b in zip(one, other))
    assert processes("cpu") == 0 and processes("cuda") >= 1


def test_check_says_whether_it_is_good_enough(language, monkeypatch, tmp_path, capsys):
    model, processor = made(language).eval(), build_processor(language[1])
    monkeypatch.setattr(script, "load", lambda folder: (model, processor))
    assert script.check(tmp_path, 2, "cpu") is False, "an untrained one is not"
    said = capsys.readouterr().out
    for setting in script.SETTINGS:
        for words in ("pope accuracy/adversarial", "chair chair_i"):
            assert f"{setting}: {words}" in said
    assert "wanted 0.70 to 0.90" in said and "wanted 0.10 to 0.30" in said
