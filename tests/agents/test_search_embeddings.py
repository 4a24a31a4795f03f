"""Search by embeddings: fusion by hand, passages, rankings that repeat themselves, a cache that holds what it says."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.agents.toolbox import Toolbox, Toolkit, ToolSource
from rehearsal.agents.toolkit import dense, make_source
from rehearsal.agents.toolkit.dense import DenseIndex, shared_encoder
from rehearsal.agents.toolkit.fusion import DEPTH, FusedCorpus, reciprocal_rank_fusion
from rehearsal.agents.toolkit.search import Search
from rehearsal.environments.corpus import Corpus, Document, read_corpus
from rehearsal.errors import ModelError, RehearsalError, ToolError
from rehearsal.models.encoder import Encoder
from rehearsal.trajectory import ToolCall

MakeFolder = Callable[..., Path]
DOCUMENTS = [
    {"id": "fox", "title": "Foxes", "text": "the red fox hunts at night. foxes live in burrows."},
    {"id": "owl", "title": "Owls", "text": "owls hunt at night and see well in the dark."},
    {"id": "hen", "title": "Hens", "text": "a hen lays eggs. the fox is her enemy."},
    {"id": "spade", "text": "gardening tools"},
]


@pytest.fixture(scope="module")
def bert(encoder_folder: MakeFolder) -> Path:
    return encoder_folder("bert")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_made", type(dense._made)())


def say(source: ToolSource, tool_name: str, **arguments: Any) -> str:
    return Toolbox(list(source.open())).execute(ToolCall(tool_name, arguments)).told


def keys(shown: str) -> list[str]:
    return [line[1 : line.index("]")] for line in shown.splitlines()]


# Fusion


def test_fusion_by_hand() -> None:
    """a: 1/61 + 1/62 = 0.032522, c: 1/63 + 1/61 = 0.032266, b: 1/62 = 0.016129, d: 1/63 = 0.015873."""
    a, b, c, d = range(4)
    fused = reciprocal_rank_fusion([[a, b, c], [c, a, d]])
    assert [number for number, _ in fused] == [a, c, b, d]
    expected = [1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62, 1 / 63]
    assert [score for _, score in fused] == pytest.approx(expected, abs=1e-12)
    # With a small k the first rank outweighs two middling ones: 1/1 against 1/2 + 1/3.
    assert [n for n, _ in reciprocal_rank_fusion([[7, 5, 6], [8, 6, 5]], k=0)] == [7, 8, 5, 6]
    assert [n for n, _ in reciprocal_rank_fusion([[7, 5, 6], [8, 6, 5]])] == [5, 6, 7, 8]
    assert reciprocal_rank_fusion([[], []]) == []


@given(st.lists(st.permutations(range(7)), min_size=1, max_size=5), st.data())
def test_the_order_of_the_rankings_does_not_matter(rankings: list[list[int]], data: st.DataObject) -> None:
    cut = [ranking[: data.draw(st.integers(0, 7))] for ranking in rankings]
    fused = reciprocal_rank_fusion(cut)
    assert {number for number, _ in fused} == {number for ranking in cut for number in ranking}
    assert reciprocal_rank_fusion(data.draw(st.permutations(cut))) == fused
    assert all(one[1] > other[1] or (one[1] == other[1] and one[0] < other[0])
               for one, other in itertools.pairwise(fused))  # fmt: skip


# The index


class Compass:
    """An encoder of four words, whose vectors are known; a text's is that of its first word, 6 words are taken."""

    max_tokens = 6
    dimension = 2

    def __init__(self, query: str = "", document: str = "") -> None:
        self.vectors = {"north": (0.0, 1.0), "east": (1.0, 0.0), "northeast": (0.6, 0.8), "south": (0.0, -1.0)}
        self.prefixes = {"query": query, "document": document}

    def token_ids(self, texts: Sequence[str], cut: bool = True) -> list[np.ndarray]:
        known = [*self.vectors, "filler"]
        found = [[known.index(word) if word in known else 4 for word in text.split()] for text in texts]
        return [np.asarray(ids[: self.max_tokens] if cut else ids, np.int32) for ids in found]

    def embed_tokens(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        every = [*self.vectors.values(), (0.0, 0.0)]
        return np.asarray([every[one[0]] if len(one) else (0.0, 0.0) for one in ids], np.float32).reshape(-1, 2)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed_tokens(self.token_ids(texts))


def index_of(*texts: str, encoder: Any = None, **options: Any) -> DenseIndex:
    documents = [Document(f"d{number}", "", text) for number, text in enumerate(texts)]
    return DenseIndex(documents, encoder or Compass(), **options)


def test_documents_are_ranked_by_cosine() -> None:
    index = index_of("south", "north", "east", "northeast", "north")
    found = index.search("north", 5)
    assert [match.number for match in found] == [1, 4, 3, 2, 0], "of equal documents the earlier one comes first"
    assert [match.cosine for match in found] == pytest.approx([1.0, 1.0, 0.8, 0.0, -1.0])
    assert [match.number for match in index.search("east", 2)] == [2, 3]
    assert index.search("", 5) == index.search("  \n", 5) == []
    assert index.search("filler", 5) == [], "a query without an embedding finds nothing rather than anything"


def test_a_document_is_as_near_as_its_nearest_passage() -> None:
    """12 words are two passages of 6: the second begins with the word that counts."""
    long = "south filler filler filler filler filler north filler filler filler filler filler"
    index = index_of("northeast", long, "  ", "east")
    assert index._begin_F.tolist() == [0, 1, 3]
    assert index._number_F.tolist() == [0, 1, 3], "a document without anything in it is not found"
    best, *_ = index.search("north", 9)
    assert (best.number, best.cosine) == (1, pytest.approx(1.0))
    assert best.passage.startswith("north filler")
    assert best.beginning(2) == "north filler..."
    assert best.beginning(64) == best.passage.strip()
    assert [match.number for match in index.search("south", 1)] == [1]
    assert index_of(" ", "").search("north", 3) == []


def test_prefixes_go_before_queries_and_passages() -> None:
    index = index_of("filler", "south filler", query_prefix="north ", document_prefix="east ")
    assert [match.cosine for match in index.search("south", 2)] == pytest.approx([0.0, 0.0])
    assert index.search("south", 1)[0].passage == "filler", "what is shown has no prefix"
    encoder = Compass(query="north ", document="north ")
    assert index_of("south", encoder=encoder).search("east", 1)[0].cosine == pytest.approx(1.0)
    plain = index_of("south", encoder=encoder, query_prefix="", document_prefix="")
    assert plain.search("south", 1)[0].cosine == pytest.approx(1.0)


@given(
    texts=st.lists(st.text(alphabet="ab c\n.é漢", max_size=200), min_size=1, max_size=4),
    title=st.sampled_from(["", "a title", "a very long title that leaves no room"]),
)
def test_passages_hold_all_of_a_document(encoder_folder: MakeFolder, texts: list[str], title: str) -> None:
    encoder = _small(encoder_folder)
    documents = [Document(str(number), title, text) for number, text in enumerate(texts)]
    numbers, parts, ids = dense._passages(documents, encoder, "p: ")
    assert numbers == sorted(numbers)
    assert all(3 <= len(one) <= encoder.max_tokens for one in ids)
    for number, document in enumerate(documents):
        held = "".join(part for of, part in zip(numbers, parts, strict=True) if of == number)
        for word in (document.title if len(title) > 10 else "").split() + document.text.split():
            assert "".join(word) in "".join(held.split()), "no letter is lost"
    for number, part, one in zip(numbers, parts, ids, strict=True):
        head = "p: a title " if title == "a title" and texts[number].strip() else "p: "
        np.testing.assert_array_equal(one, encoder.token_ids([head + part], cut=False)[0])


_kept: list[Encoder] = []


def _small(encoder_folder: MakeFolder) -> Encoder:
    if not _kept:
        _kept.append(Encoder(encoder_folder("bert"), max_tokens=24))
    return _kept[0]


def test_words_are_cut_only_where_they_must_be(bert: Path) -> None:
    words = [f"word{i}" for i in range(40)]
    _, parts, _ = dense._passages([Document("1", "", " ".join(words))], Encoder(bert, max_tokens=24), "")
    assert len(parts) >= 10
    assert [word for part in parts for word in part.split()] == words
    _, parts, _ = dense._passages([Document("1", "", "x" * 100)], Encoder(bert, max_tokens=24), "")
    assert [len(part) for part in parts] == [20] * 5


# With a model


def test_the_cosines_are_those_of_the_encoder(bert: Path) -> None:
    encoder = Encoder(bert)
    documents = read_corpus(DOCUMENTS)
    found = DenseIndex(documents, encoder, query_prefix="query: ").search("night fox", 4)
    read = [f"{one.title} {one.text}".strip() for one in documents]
    expected = encoder.embed(read) @ encoder.embed(["query: night fox"])[0]
    assert {match.number: match.cosine for match in found} == pytest.approx(dict(enumerate(expected)), abs=1e-5)
    assert [match.number for match in found] == np.argsort(-expected).tolist()


def test_neither_the_batch_nor_the_neighbours_change_a_ranking(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{'x' * (i % 7)} number {i} of {i * i}" for i in range(40)] + ["twin text"] * 3
    rankings = []
    for size in (1, 7, 64):
        monkeypatch.setattr(dense, "_made", type(dense._made)())
        index = index_of(*texts, encoder=Encoder(bert, batch_size=size))
        rankings.append([[match.number for match in index.search(query, 43)] for query in ("of 25", "twin", "zz")])
    assert rankings[0] == rankings[1] == rankings[2]
    for ranking in rankings[0]:
        first = ranking.index(40)
        assert ranking[first : first + 3] == [40, 41, 42], "equal documents stay in their order, whatever batch"


def test_hybrid_finds_what_words_alone_miss(bert: Path) -> None:
    words, both = Search(DOCUMENTS), Search(DOCUMENTS, embeddings=bert)
    assert say(words, "search", query="gardning tols") == "Nothing was found; try other words."
    assert keys(say(both, "search", query="gardning tols"))[0] == "spade"
    # And it still ranks first what words know, where the encoder alone (of letters) does not.
    assert keys(say(both, "search", query="burrows"))[0] == "fox"
    assert say(both, "open", document="spade") == "gardening tools"


def test_the_modes(bert: Path) -> None:
    shown = {
        mode: say(Search(DOCUMENTS, embeddings=bert, mode=mode, words=3), "search", query="fox")
        for mode in ("bm25", "embeddings", "hybrid")
    }
    default = say(Search(DOCUMENTS, embeddings=bert, words=3), "search", query="fox")
    assert shown["hybrid"] == default
    assert shown["bm25"] == say(Search(DOCUMENTS, words=3), "search", query="fox")
    assert keys(shown["bm25"]) == ["hen", "fox"] or keys(shown["bm25"]) == ["fox", "hen"]
    assert sorted(keys(shown["hybrid"])) == sorted(keys(shown["embeddings"])) == ["fox", "hen", "owl", "spade"]
    assert "[spade] gardening tools" in shown["embeddings"].splitlines()
    assert "[owl] Owls: owls hunt at..." in shown["embeddings"].splitlines()
    corpus = Corpus(read_corpus(DOCUMENTS))
    index = DenseIndex(corpus.documents(), Encoder(bert))
    by_words = [index.number_of[hit.key] for hit in corpus.search("fox", DEPTH)]
    near = [match.number for match in index.search("fox", DEPTH)]
    hits = FusedCorpus(corpus, index).search("fox", 4)
    assert [(index.number_of[hit.key], hit.score) for hit in hits] == reciprocal_rank_fusion([by_words, near])
    for source in (Search(DOCUMENTS, embeddings=bert), Search(DOCUMENTS, embeddings=bert, mode="embeddings")):
        assert say(source, "search", query=" \n") == "Nothing was found; try other words."
        assert keys(say(source, "search", query="?!")) != [], "signs have an embedding"
        assert len(keys(say(source, "search", query="\ud800 fox " * 200))) == 4


def test_a_causal_language_model_will_do(encoder_folder: MakeFolder) -> None:
    folder = encoder_folder("qwen3")
    for pooling in ("mean", "last"):
        source = Search(DOCUMENTS, embeddings=folder, pooling=pooling, mode="embeddings", passage_tokens=16)
        assert len(keys(say(source, "search", query="fox"))) == 4
    with pytest.raises(ModelError, match='use "last" or "mean"'):
        Search(DOCUMENTS, embeddings=folder, pooling="cls")


def test_episodes_that_call_at_once_get_the_same(bert: Path) -> None:
    source = Search(DOCUMENTS, embeddings=bert)
    queries = ["fox", "night owl", "garden", "hens and eggs", "burow"]
    expected = {query: say(Search(DOCUMENTS, embeddings=bert), "search", query=query) for query in queries}
    wrong: list[Any] = []

    def play(first: int) -> None:
        for query in queries[first:] + queries[:first]:
            told = say(source, "search", query=query)
            if told != expected[query]:
                wrong.append((query, told))

    threads = [threading.Thread(target=play, args=(number % 5,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_only_opening_is_fast(bert: Path) -> None:
    kit = Toolkit([Search(DOCUMENTS, embeddings=bert)])
    assert not kit.fast
    assert {tool.name: tool.fast for tool in kit.sources[0].open()} == {"search": False, "open": True}  # type: ignore[attr-defined]
    assert Search(DOCUMENTS, embeddings=bert, mode="bm25").fast


# Embedded once


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passages were embedded, each time."""
    counts: list[int] = []
    real = Encoder.embed_tokens

    def counted(self: Encoder, ids: Sequence[np.ndarray]) -> np.ndarray:
        counts.append(len(ids))
        return real(self, ids)

    monkeypatch.setattr(Encoder, "embed_tokens", counted)
    return counts


def test_documents_are_embedded_once_a_process(bert: Path, embedded: list[int]) -> None:
    twins = [*DOCUMENTS, {"id": "twin", "text": "gardening tools"}]
    Search(twins, embeddings=bert)
    assert embedded == [4], "equal ones together"
    source = Search(twins, embeddings=str(bert))
    assert embedded == [4]
    for _ in range(3):
        say(source, "search", query="fox")
    assert embedded == [4, 1], "and a query once"
    Search(twins, embeddings=bert, document_prefix="p: ")
    Search(twins, embeddings=bert, pooling="cls")
    assert embedded == [4, 1, 4, 4], "with other settings anew"


def test_a_folder_that_changed_is_loaded_anew(encoder_folder: MakeFolder) -> None:
    folder = encoder_folder("bert", seed=3)
    options: dict[str, Any] = {
        "pooling": None, "max_tokens": None, "batch_size": 32, "device": "cpu", "dtype": "float32"
    }  # fmt: skip
    before = shared_encoder(folder, **options)
    assert shared_encoder(folder, **options) is before
    other = encoder_folder("bert", seed=4)
    # The loaded weights may lie in the old file, so it is replaced and not written over, as savers of models do.
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert shared_encoder(folder, **options).fingerprint != before.fingerprint


def test_a_cache_is_used_by_the_next_process_and_by_nothing_else(
    bert: Path, encoder_folder: MakeFolder, tmp_path: Path, embedded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "deep" / "cache"

    def search(documents: Sequence[Any] = DOCUMENTS, **options: Any) -> str:
        """As in a process of its own."""
        monkeypatch.setattr(dense, "_made", type(dense._made)())
        dense._loaded.cache_clear()
        return say(Search(documents, **{"embeddings": bert, "cache": str(cache), **options}), "search", query="fox")

    first = search()
    (file,) = cache.iterdir()
    assert embedded == [4, 1]
    assert search() == first
    assert embedded == [4, 1, 1], "the query alone"
    for number, changes in enumerate(
        (
            {"documents": DOCUMENTS[:3]}, {"documents": [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]]},
            {"embeddings": encoder_folder("bert", seed=9)}, {"pooling": "last"}, {"document_prefix": "p: "},
            {"passage_tokens": 30}, {"dtype": "bfloat16"},
        ),
        start=2,
    ):  # fmt: skip
        search(**changes)  # type: ignore[arg-type]
        assert len(list(cache.iterdir())) == number, changes
    monkeypatch.setattr(dense, "_made", type(dense._made)())
    whole = file.read_bytes()
    shape = np.load(file).shape
    for damaged in (b"nothing", whole[:-7], whole[:20], b"", _npy(np.zeros((3, 2), np.float32)),
                    _npy(np.full(shape, np.nan, np.float32)), _npy(np.zeros(shape))):  # fmt: skip
        file.write_bytes(damaged)
        assert search() == first
        assert file.read_bytes() == whole, "made anew"
    assert not list(cache.glob("*.part"))
    with pytest.raises(ToolError, match="embeddings cannot be written"):
        search(cache=file / "below", query_prefix="q: ")


def _npy(array: np.ndarray) -> bytes:
    import io

    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


# What cannot be


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "dense"}, "no mode 'dense' of search; use bm25, embeddings or hybrid"),
        ({"mode": "embeddings"}, "mode 'embeddings' of search needs an encoder; name its folder in embeddings"),
        ({"mode": "hybrid"}, "mode 'hybrid' of search needs an encoder"),
        ({"pooling": "mean"}, "option pooling of search needs an encoder"),
        ({"cache": "x"}, "option cache of search needs an encoder"),
        ({"embeddings": "./nowhere"}, r"nowhere is not a Hugging Face model folder: it has no config\.json"),
        ({"embeddings": "BERT", "pooling": "max"}, "no pooling 'max'"),
        ({"embeddings": "BERT", "passage_tokens": 4}, "max_tokens .* from 8 on"),
        ({"embeddings": "BERT", "query_prefix": "x" * 40}, "query_prefix takes 42 of the 64 tokens"),
        ({"embeddings": "BERT", "document_prefix": "x" * 40}, "document_prefix takes 42 of the 64"),
        ({"embeddings": "BERT", "corpus": []}, "corpus has no documents"),
    ],
)
def test_options_that_cannot_be_used(bert: Path, options: dict[str, Any], told: str) -> None:
    given_options = {"corpus": DOCUMENTS, **options}
    if given_options.get("embeddings") == "BERT":
        given_options["embeddings"] = str(bert)
    with pytest.raises(RehearsalError, match=told) as caught:
        make_source("search", given_options)
    assert "\n" not in str(caught.value)


def test_an_index_in_a_file_and_a_corpus_of_lines(bert: Path, tmp_path: Path) -> None:
    lines = tmp_path / "corpus.jsonl"
    lines.write_text("\n".join(json.dumps(entry) for entry in DOCUMENTS))
    source = Search(lines, index=str(tmp_path / "index.db"), embeddings=bert)
    assert say(source, "search", query="gardning") == say(Search(DOCUMENTS, embeddings=bert), "search",
                                                          query="gardning")  # fmt: skip
    source.close()
    with pytest.raises(Exception, match="closed"):
        source.corpus.documents()
