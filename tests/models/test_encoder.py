"""Encoders: their embeddings against plain PyTorch, padding and batches, and folders that hold none."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from rehearsal.errors import ModelError
from rehearsal.models.encoder import POOLINGS, Encoder, pool

MakeFolder = Callable[..., Path]
TEXTS = ["a fox", "the red fox hunts at night", "owl", "an owl sees well in the dark of the wood", "hen"]


@pytest.fixture(scope="module")
def bert(encoder_folder: MakeFolder) -> Path:
    return encoder_folder("bert")


@pytest.fixture(scope="module")
def qwen3(encoder_folder: MakeFolder) -> Path:
    return encoder_folder("qwen3")


def plain(folder: Path, text: str, pooling: str) -> np.ndarray:
    """The embedding of a text by itself, as the model cards compute it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        encoded = tokenizer([text], return_tensors="pt", return_token_type_ids=False)
        hidden_TD = model(**encoded).last_hidden_state[0]
    vector_D = {"mean": hidden_TD.mean(dim=0), "cls": hidden_TD[0], "last": hidden_TD[-1]}[pooling]
    return (vector_D / vector_D.norm()).numpy()


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("bert", "mean"), ("bert", "cls"), ("bert", "last"), ("qwen3", "mean"), ("qwen3", "last")],
)
def test_an_embedding_is_that_of_plain_pytorch(bert: Path, qwen3: Path, kind: str, pooling: str) -> None:
    folder = bert if kind == "bert" else qwen3
    found_ND = Encoder(folder, pooling=pooling).embed(TEXTS)
    assert found_ND.dtype == np.float32
    for text, vector_D in zip(TEXTS, found_ND, strict=True):
        np.testing.assert_allclose(vector_D, plain(folder, text, pooling), atol=1e-5)
    assert abs(found_ND @ found_ND.T - np.eye(len(TEXTS))).max() > 0.01, "the texts have embeddings of their own"
    np.testing.assert_allclose(np.linalg.norm(found_ND, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_neither_padding_nor_the_batch_changes_an_embedding(bert: Path, qwen3: Path, kind: str, pooling: str) -> None:
    folder = bert if kind == "bert" else qwen3
    alone_ND = np.concatenate([Encoder(folder, pooling=pooling).embed([text]) for text in TEXTS])
    for size in (2, 3, 32):
        together_ND = Encoder(folder, pooling=pooling, batch_size=size).embed(TEXTS)
        np.testing.assert_allclose(together_ND, alone_ND, atol=1e-5)


def test_a_tokenizer_that_pads_at_the_left_changes_nothing(qwen3: Path, tmp_path: Path) -> None:
    """The token at the place that the sum of the mask names is the last one only where padding comes behind."""
    folder = shutil.copytree(qwen3, tmp_path / "left")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    np.testing.assert_array_equal(
        Encoder(folder, pooling="last").embed(TEXTS), Encoder(qwen3, pooling="last").embed(TEXTS)
    )


def test_pooling_by_hand() -> None:
    hidden_BTD = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [torch.nan, 9.0]], [[torch.nan, 0.0], [5.0, 1.0], [7.0, 3.0]]])
    mask_BT = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden_BTD, mask_BT, "mean").tolist() == [[2.0, 4.0], [6.0, 2.0]]
    assert pool(hidden_BTD, mask_BT, "cls").tolist() == [[1.0, 2.0], [5.0, 1.0]]
    assert pool(hidden_BTD, mask_BT, "last").tolist() == [[3.0, 6.0], [7.0, 3.0]]


def test_a_long_text_is_cut_and_keeps_its_special_tokens(bert: Path) -> None:
    encoder = Encoder(bert, max_tokens=10)
    (cut,) = encoder.token_ids(["abcdefghijklmnop"])
    (whole,) = encoder.token_ids(["abcdefghijklmnop"], cut=False)
    assert (len(cut), len(whole)) == (10, 18)
    assert cut[0] == whole[0] and cut[-1] == whole[-1] and cut[:9].tolist() == whole[:9].tolist()
    np.testing.assert_array_equal(encoder.embed(["abcdefghijklmnop"]), encoder.embed(["abcdefgh"]))
    assert Encoder(bert).max_tokens == 64
    assert encoder.embed([]).shape == (0, 32)


def test_nothing_else_sees_that_an_encoder_was_loaded(bert: Path) -> None:
    """BERT's unused top layer is not in the folder and is drawn: the user's random numbers must not move."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, other = Encoder(bert), Encoder(bert)
    assert torch.equal(torch.rand(3), expected)
    assert one.fingerprint == other.fingerprint
    assert Encoder(bert, pooling="cls").fingerprint != one.fingerprint


def test_the_fingerprint_is_of_the_weights_and_not_of_the_path(encoder_folder: MakeFolder, tmp_path: Path) -> None:
    folder = encoder_folder("bert", seed=1)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert Encoder(folder).fingerprint == Encoder(moved).fingerprint
    assert Encoder(folder).fingerprint != Encoder(encoder_folder("bert", seed=2)).fingerprint


def test_many_threads_share_an_encoder(bert: Path) -> None:
    """A fast tokenizer that two threads use at once raises "Already borrowed"."""
    encoder = Encoder(bert)
    expected = {text: encoder.embed([text]) for text in TEXTS}
    wrong: list[Any] = []

    def look() -> None:
        try:
            for _ in range(5):
                for text, vector in expected.items():
                    encoder.token_ids([text], cut=False)
                    if not np.array_equal(encoder.embed([text]), vector):
                        wrong.append(text)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=look) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# What a folder of sentence-transformers says


def declare(bert: Path, folder: Path, pooling: dict[str, Any], extra: str = "Normalize", **settings: Any) -> Path:
    shutil.copytree(bert, folder)
    kinds = ("Transformer", "Pooling", extra)
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls", "embedding_dimension": 32}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_a_folder_may_say_how_it_is_used(bert: Path, tmp_path: Path, said: dict[str, Any], pooling: str) -> None:
    prompts = {"prompts": {"query": "query: ", "document": "", "passage": "passage: "}}
    folder = declare(bert, tmp_path / "st", said, config_sentence_transformers=prompts,
                     sentence_bert_config={"max_seq_length": 24})  # fmt: skip
    encoder = Encoder(folder)
    assert (encoder.pooling, encoder.max_tokens) == (pooling, 24)
    assert encoder.prefixes == {"query": "query: ", "document": "passage: "}
    asked = Encoder(folder, pooling="mean", max_tokens=64)
    assert (asked.pooling, asked.max_tokens) == ("mean", 64)


def test_parts_that_are_not_computed_are_refused(bert: Path, tmp_path: Path) -> None:
    """An encoder without its last layer, or with another pooling, still gives numbers."""
    with pytest.raises(ModelError, match="a part Dense of sentence-transformers"):
        Encoder(declare(bert, tmp_path / "dense", {"pooling_mode": "mean"}, extra="Dense"))
    for number, said in enumerate(
        ({"pooling_mode": "max"}, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, {},
         {"pooling_mode": "mean", "include_prompt": False})
    ):  # fmt: skip
        folder = declare(bert, tmp_path / str(number), said)
        with pytest.raises(ModelError, match="pools in a way that is not supported"):
            Encoder(folder)
        assert Encoder(folder, pooling="mean").pooling == "mean"


# Folders that cannot be used


def test_folders_without_an_encoder(bert: Path, qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        Encoder(tmp_path / "nowhere")
    no_tokenizer = shutil.copytree(bert, tmp_path / "a", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    with pytest.raises(ModelError, match="has no tokenizer; save it"):
        Encoder(no_tokenizer)
    no_weights = shutil.copytree(bert, tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        Encoder(no_weights)
    broken = shutil.copytree(bert, tmp_path / "c")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Encoder(broken)
    (broken / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Encoder(broken)
    with pytest.raises(ModelError, match=r"first token of .* sees no other"):
        Encoder(qwen3, pooling="cls")


def test_weights_that_are_missing_are_not_made_up(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bert, tmp_path / "less")
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights .* encoder\.layer\.1\.output\.dense\.weight"):
        Encoder(folder)


def test_an_encoder_that_gives_no_numbers(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    model = AutoModel.from_pretrained(bert)
    torch.nn.init.constant_(model.encoder.layer[1].output.dense.weight, float("nan"))
    shutil.copytree(bert, folder)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="not finite"):
        Encoder(folder).embed(["fox"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pooling": "max"}, "no pooling 'max'; use mean or cls or last"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"max_tokens": 3}, "max_tokens .* from 8 on, not 3"),
        ({"max_tokens": True}, "max_tokens .* not True"),
        ({"max_tokens": 65}, "takes 64 tokens of a text, not 65"),
        ({"batch_size": 0}, "batch_size .* from 1 on"),
        ({"device": "abacus"}, "no device 'abacus' for an encoder"),
    ],
)
def test_options_that_cannot_be_used(bert: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        Encoder(bert, **options)
    assert set(POOLINGS) == {"mean", "cls", "last"}
