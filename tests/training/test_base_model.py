"""The small base model: its tokenizer, its transcripts, its training, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehearsal.environments import make
from rehearsal.environments.bandit import PAIRS
from rehearsal.environments.check import check_env
from rehearsal.environments.splits import content_split
from rehearsal.errors import CheckpointError, RecipeError, RehearsalError, TrainingDiverged
from rehearsal.models.chat import ANSWER_TAGS, ChatRenderer
from rehearsal.training import base_training
from rehearsal.training.base_model import (
    BaseConfig,
    Scene,
    SkillMix,
    Transcript,
    TranscriptSource,
    load_transcripts,
    make_base,
    make_base_command,
    save_transcripts,
)
from rehearsal.training.base_play import opening_tokens, sampled_play
from rehearsal.training.base_resume import Unfinished
from rehearsal.training.base_tokenizer import ADDED_TOKENS, CONTROL_TOKENS, MIN_VOCABULARY, train_tokenizer
from rehearsal.training.base_training import BaseState, heldout_losses, new_model, schedule, train_base
from rehearsal.training.base_transcripts import make_tokenizer, stream_transcripts
from rehearsal.trajectory import Kind

TINY = BaseConfig(
    hidden=32, layers=2, heads=2, head_dim=16, mlp=64, max_positions=2048, vocabulary=700, tokens=80_000,
    tokens_per_step=2048, learning_rate=1e-2, tokenizer_episodes=120, heldout_episodes=30,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads, and other tests may run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(TINY)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("base") / "new" / "folder"

    def evaluate(where: Path) -> Mapping[str, float]:
        assert (where / "model.safetensors").exists()
        return {
            "success_frozenlake": 0.123,
            "success_bandit_reversed": 0.5,
            "valid_answers": 0.987,
            "play_episodes": 7.0,
        }

    return folder, make_base(TINY, folder, progress=False, evaluate=evaluate, background=False)


# --- tokenizer --------------------------------------------------------------------------------------------------------


@given(text=st.text())
def test_any_text_survives(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(parts=st.lists(st.sampled_from([*ADDED_TOKENS, "\n", "  ", " P", "12", "||", "é", "🎉", "\r\n"]), max_size=12))
def test_any_text_with_tags_survives(tokenizer: Any, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    tags = [token for token in tokenizer.convert_ids_to_tokens(ids) if token in ADDED_TOKENS]
    assert tags == [part for part in parts if part in ADDED_TOKENS]


@pytest.mark.parametrize("token", ADDED_TOKENS)
def test_tags_and_control_tokens_are_one_token_each(tokenizer: Any, token: str) -> None:
    assert len(tokenizer.encode(token)) == 1
    assert len(tokenizer.encode(f"a{token}b")) == 3
    assert ADDED_TOKENS.index(token) == tokenizer.encode(token)[0]


def test_tags_are_kept_where_special_tokens_are_skipped(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        text = "".join(ANSWER_TAGS)
        ids = each.encode(text + "".join(CONTROL_TOKENS))
        assert each.decode(ids, skip_special_tokens=True) == text
        assert each.eos_token == "<|im_end|>"
        assert each.pad_token == "<|endoftext|>"


def test_digits_and_symbols_stay_apart(tokenizer: Any) -> None:
    def tokens(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert tokens("_ P _ O\nG _ * #") == ["_", " P", " _", " O", "\n", "G", " _", " *", " #"]
    assert tokens("me 12 345") == ["me", " 1", "2", " 3", "4", "5"]
    assert tokens("(1,2) (3,4)") == ["(", "1", ",", "2", ")", " (", "3", ",", "4", ")"]
    assert tokens("##==__") == list("##==__")
    for sign in "!~@%QZz7":  # symbols of nobody's grid yet
        assert tokens(f"{sign} {sign}") == [sign, f" {sign}"]


def test_words_of_the_rules_are_short(tokenizer: Any) -> None:
    assert len(tokenizer.encode(" frozen lake player Down Right goal")) == 6
    assert opening_tokens(tokenizer) < 140


def test_a_tokenizer_is_fixed_by_its_texts() -> None:
    texts = ["Walk over the frozen lake to the goal.", "Push every box onto a target."] * 3
    first, second = (train_tokenizer(texts, 400).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    assert json.loads(first)["model"]["merges"]


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least"):
        train_tokenizer(["a"], MIN_VOCABULARY - 1)


def test_the_renderer_knows_the_tokenizer_well(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    assert renderer.notes == []
    assert renderer.fast
    assert not renderer.rewrites_history
    assert renderer.stop_texts == ("<|im_end|>",)


# --- transcripts ------------------------------------------------------------------------------------------------------


def test_only_tasks_of_the_training_split_are_played(tokenizer: Any) -> None:
    # Small worlds, so that tasks would meet if nothing kept them apart.
    scenes = (Scene("frozenlake", {"size": 3}), Scene("countdown", {"max_number": 4}), Scene("bandit"))
    config = replace(TINY, scenes=scenes)
    tasks: dict[str, set[tuple[str, str]]] = {}
    for split in ("train", "test"):
        source = TranscriptSource(config, tokenizer, split)
        played = [source.episode(i)[0] for i in range(300)]
        assert {trajectory.split for trajectory in played} == {split}
        tasks[split] = {(trajectory.environment, trajectory.task) for trajectory in played}
    assert len(tasks["test"]) > 30
    assert not tasks["train"] & tasks["test"]
    assert TranscriptSource(config, tokenizer).split == "train"


def test_a_transcript_says_nothing_of_test_tasks(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    held_out = {name for split in ("validation", "test") for pair in PAIRS[split] for name in pair}
    config = replace(TINY, scenes=(Scene("bandit"), *(s for s in BaseConfig().scenes if "MadeUp" in s.environment)))
    text = "".join(renderer.decode(t.token_ids) for t in islice(TranscriptSource(config, tokenizer).transcripts(), 200))
    assert "Clerk" in text
    assert not held_out & set(text.replace("<", " ").replace(".", " ").split())


def test_made_up_names_are_split_by_content() -> None:
    env = make("rehearsal.training.base_scenes:MadeUpBandit")
    names = set()
    for seed in range(60):
        for split in ("train", "validation"):
            observation, info = env.reset(seed=seed, options={"split": split})
            arms = env.describe()["arms"]
            assert content_split(" ".join(arms)) == split == info["split"]
            assert observation == f"arms {arms[0]} {arms[1]}"
            assert env.describe()["best"] in arms
            names.update(arms)
    assert len(names) > 150
    assert not names & {name for pairs in PAIRS.values() for pair in pairs for name in pair}


def test_episodes_are_functions_of_their_number(tokenizer: Any) -> None:
    first, second = TranscriptSource(TINY, tokenizer), TranscriptSource(TINY, tokenizer)
    later = second.episode(9)[1]
    assert first.episode(9)[1].token_ids.tolist() == later.token_ids.tolist()
    assert first.episode(8)[1].token_ids.tolist() != later.token_ids.tolist()
    other = TranscriptSource(replace(TINY, seed=1), tokenizer).episode(9)[1]
    assert other.token_ids.tolist() != later.token_ids.tolist()


def test_episodes_with_one_opening_share_their_system_prompt(tokenizer: Any) -> None:
    by_opening: dict[int, list[Transcript]] = {}
    for transcript in islice(TranscriptSource(TINY, tokenizer).transcripts(), 150):
        by_opening.setdefault(transcript.opening, []).append(transcript)
    prompts = set()
    for members in by_opening.values():
        systems = {m.token_ids[: int(np.flatnonzero(m.kinds == Kind.OBSERVATION)[0])].tobytes() for m in members}
        assert len(systems) == 1
        prompts |= systems
    assert len(prompts) > 10


def test_playing_in_the_background_gives_the_same_episodes(tokenizer: Any) -> None:
    stream = stream_transcripts(TINY, tokenizer, background=True)
    played = list(islice(stream, 150))  # beyond the first chunk
    stream.close()
    expected = islice(TranscriptSource(TINY, tokenizer).transcripts(), 150)
    for here, there in zip(expected, played, strict=True):
        assert np.array_equal(here.token_ids, there.token_ids)
        assert np.array_equal(here.kinds, there.kinds)
        assert here.opening == there.opening


def test_a_failure_in_the_background_is_told(tokenizer: Any) -> None:
    broken = replace(TINY, scenes=(Scene("frozenlake", {"size": 99}),))
    with pytest.raises(RehearsalError, match=r"plays the episodes failed.*size"):
        next(stream_transcripts(broken, tokenizer, background=True))


def test_lines_to_recite_are_hardly_ever_the_same_twice() -> None:
    env = make("rehearsal.training.base_scenes:Recite")
    assert check_env(env).ok
    lines: dict[str, set[str]] = {split: set() for split in ("train", "validation", "test")}
    for split, seen in lines.items():
        for seed in range(400):
            line, _ = env.reset(seed=seed, options={"split": split})
            (wanted,) = env.oracle()
            asked = line.rpartition(" ")[2]
            if line.endswith("?"):
                assert f"{asked[:-1]}: {wanted}." in line
            else:
                assert wanted == line
            assert env.step(wanted)[4]["success"]
            seen.add(line)
        assert len(seen) > 350
    assert not lines["train"] & lines["validation"] | lines["train"] & lines["test"]


def test_lookups_of_the_base_are_in_many_worlds() -> None:
    env = make("rehearsal.training.base_scenes:LookupAnywhere", hops=1)
    worlds = set()
    for seed in range(60):
        env.reset(seed=seed, options={"split": "train"})
        title = env.describe()["documents"][0]
        assert title in env.tools[1](title), "the tools read the world that was asked about"
        worlds.add(env.world)
    assert len(worlds) == env.WORLDS
    assert 0 not in worlds, "which is the one that people train on"


def test_transcripts_come_back_from_disk(tokenizer: Any, tmp_path: Path) -> None:
    source = TranscriptSource(TINY, tokenizer)
    trajectories = [source.episode(i)[0] for i in range(12)]
    trajectories[3].success = None
    save_transcripts(tmp_path / "played.npz", trajectories)
    loaded = load_transcripts(tmp_path / "played.npz")
    assert len(loaded) == 12
    for before, after in zip(trajectories, loaded, strict=True):
        for name in ("environment", "seed", "split", "task", "stop_reason", "success"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("token_ids", "kinds", "turns", "logprobs"):
            one, other = getattr(before.segments[0], name), getattr(after.segments[0], name)
            assert one.dtype == other.dtype
            assert np.array_equal(one, other, equal_nan=name == "logprobs")
    save_transcripts(tmp_path / "none.npz", [])
    assert load_transcripts(tmp_path / "none.npz") == []


def test_a_file_that_holds_no_transcripts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", lengths=np.arange(3))
    for name in ("text.npz", "other.npz", "missing.npz"):
        with pytest.raises(CheckpointError, match=name):
            load_transcripts(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_transcripts(tmp_path / "no" / "such" / "folder.npz", [])


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_folder_loads(made: tuple[Path, dict[str, float]]) -> None:
    folder, figures = made
    assert figures["loss_last"] < 0.6 * figures["loss_first"]
    assert abs(figures["loss_first"] - np.log(figures["vocabulary"])) < 1.0
    assert figures["tokens"] >= TINY.steps * TINY.tokens_per_step
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert len(tokenizer) == model.config.vocab_size == figures["vocabulary"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == ADDED_TOKENS.index("<|im_end|>")
    assert figures["megabytes"] < 8
    # The figures belong to the weights that were written.
    heldout = list(islice(TranscriptSource(TINY, tokenizer, "validation").transcripts(), TINY.heldout_episodes))
    for name, loss in heldout_losses(model, heldout).items():
        assert loss == pytest.approx(figures[f"heldout_{name}"], rel=1e-4)


def test_generate_ends_an_answer(made: tuple[Path, dict[str, float]]) -> None:
    folder, _ = made
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "_ P _ _"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=400)
    assert output[0, -1] == tokenizer.eos_token_id


def test_the_card_tells_the_figures(made: tuple[Path, dict[str, float]]) -> None:
    folder, figures = made
    card = (folder / "MODEL_CARD.md").read_text()
    assert f"{figures['parameters']:,.0f} parameters" in card
    assert f"{figures['episodes']:,.0f} episodes" in card
    assert f"thoughts: {figures['heldout_thought']:.3f}" in card
    assert "frozenlake: 12.3%" in card
    assert "bandit, reversed: 50.0%" in card
    assert "98.7%" in card
    assert "rehearsal base --hidden 32 --layers 2 " in card
    assert "{" not in card


def test_the_same_configuration_gives_the_same_weights(tmp_path: Path) -> None:
    config = replace(TINY, tokens=8_192, tokenizer_episodes=40, heldout_episodes=5)
    weights = []
    for name in ("one", "two", "other"):
        make_base(replace(config, seed=int(name == "other")), tmp_path / name, progress=False, background=False)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    assert "not measured" in (tmp_path / "one" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("damage", [False, True])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bool
) -> None:
    config = replace(TINY, tokens=8_192, tokens_per_step=1024, tokenizer_episodes=40, heldout_episodes=5)
    monkeypatch.setattr(base_training, "SAVE_EVERY", 3)
    steps: list[int] = []

    def make(folder: Path) -> bytes:
        make_base(config, folder, progress=False, background=False)
        return (folder / "model.safetensors").read_bytes()

    whole = make(tmp_path / "whole")
    take = base_training._take

    def counted(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return take(*args)

    monkeypatch.setattr(base_training, "_take", counted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts")
    (kept,) = (tmp_path / "parts" / "unfinished").iterdir()
    assert kept.name == "step_000003"
    if damage:
        (kept / "state.pt").write_bytes(b"half")
        with pytest.raises(CheckpointError, match=r"delete .*unfinished to begin anew"):
            make(tmp_path / "parts")
        return
    assert make(tmp_path / "parts") == whole
    assert len(steps) == 5 + 8 - 3
    assert not (tmp_path / "parts" / "unfinished").exists()


def test_what_another_configuration_left_is_not_taken_up(tmp_path: Path, tokenizer: Any) -> None:
    model = new_model(TINY, tokenizer)
    Unfinished(tmp_path / "x", TINY, model).save(BaseState(step=7))
    assert Unfinished(tmp_path / "x", TINY, model).load().step == 7
    assert Unfinished(tmp_path / "x", replace(TINY, clip=0.5), model).load().step == 0
    assert not (tmp_path / "x").exists()


def test_only_what_is_said_done_and_seen_is_learnt(tokenizer: Any) -> None:
    """Held-out losses by kind, against the plain forward pass of the library."""
    model = new_model(TINY, tokenizer)
    transcripts = list(islice(TranscriptSource(TINY, tokenizer).transcripts(), 24))
    sums: dict[str, list[float]] = {}
    for transcript in transcripts:
        ids = torch.from_numpy(transcript.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        for position in range(1, len(transcript.token_ids)):
            kind = Kind(transcript.kinds[position])
            if kind in (Kind.THOUGHT, Kind.ACTION, Kind.OBSERVATION):
                opening = kind == Kind.OBSERVATION and transcript.turns[position] == 0
                loss = -float(logprobs[position - 1, transcript.token_ids[position]])
                sums.setdefault("opening" if opening else kind.name.lower(), []).append(loss)
    losses = heldout_losses(model, transcripts)
    assert losses.keys() == sums.keys() == {"thought", "action", "observation", "opening"}
    for name, values in sums.items():
        assert losses[name] == pytest.approx(np.mean(values), rel=1e-4)


def test_weights_that_are_zero_teach_nothing(tokenizer: Any) -> None:
    lake = replace(TINY, scenes=(Scene("frozenlake"),))
    transcripts = list(islice(TranscriptSource(lake, tokenizer).transcripts(), 60))
    heldout = list(islice(TranscriptSource(lake, tokenizer, "validation").transcripts(), 10))
    losses = {}
    for weight in (0.0, 1.0):
        config = replace(lake, tokens=12_000, opening_weight=0.0, observation_weight=weight)
        model = new_model(config, tokenizer)
        train_base(model, config, iter(transcripts))
        losses[weight] = heldout_losses(model, heldout)
    assert losses[1.0]["observation"] < losses[0.0]["observation"] - 0.3


def test_a_loss_that_is_not_finite_stops(tokenizer: Any) -> None:
    model = new_model(TINY, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(TrainingDiverged, match="step 0"):
        train_base(model, TINY, TranscriptSource(TINY, tokenizer).transcripts())


def test_the_schedule_rises_and_falls() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == 1.0
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert 0 < rates[-1] < 0.001
    assert schedule(0, 1, 0.0) == 1.0


def test_the_default_size_fits_the_package(tokenizer: Any) -> None:
    config = BaseConfig()
    parameters = sum(p.numel() for p in new_model(config, tokenizer).parameters())
    assert 700_000 < parameters < 1_000_000
    assert config.steps > 500


def test_sampled_play_gives_rates(made: tuple[Path, dict[str, float]]) -> None:
    rates = sampled_play(made[0], episodes=3, settings=("frozenlake", "bandit"))
    assert rates.keys() == {"success_frozenlake", "success_bandit", "valid_answers", "play_episodes"}
    assert all(0 <= rate <= 1 for name, rate in rates.items() if name != "play_episodes")


def test_options_by_name() -> None:
    config = BaseConfig.from_options({"tokens": 50_000, "learning_rate": 1, "mix.oracle": 0.5})
    assert (config.tokens, config.learning_rate, config.mix) == (50_000, 1, SkillMix(oracle=0.5))
    assert BaseConfig.from_options({}) == BaseConfig()
    assert config.to_options() == {"tokens": 50_000, "learning_rate": 1, "mix.oracle": 0.5}
    assert BaseConfig.from_options(TINY.to_options()) == TINY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": 5}, "did you mean tokens"),
        ({"mix.oracel": 0.5}, "did you mean mix.oracle"),
        ({"tokens": 0.5}, "whole number"),
        ({"learning_rate": "fast"}, "must be a number"),
        ({"layers": True}, "whole number"),
        ({"scenes": 3}, "no option"),
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads"),
        ({"tokens": 5}, "at least tokens_per_step"),
        ({"head_dim": 15}, "even"),
        ({"warmup": 2.0}, "share"),
        ({"vocabulary": 20}, "vocabulary"),
        ({"mix.random": -1.0}, "negative"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make_base_command(tmp_path, options)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        make_base(TINY, tmp_path / "file", progress=False)
