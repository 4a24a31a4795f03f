"""What several tests of verifiers need."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentence model in the form of NLTK's own, learnt from a few lines."""
    import nltk
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    text = "This is Mr. Smith. He came at 5 p.m. to see Mr. Jones. They talked. Then Mr. Smith left. It was late. " * 10
    trainer = PunktTrainer()
    trainer.train(text)
    folder = tmp_path_factory.mktemp("nltk")
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True)
    nltk.data.path.insert(0, str(folder))  # it writes only below its own folders
    save_punkt_params(trainer.get_params(), dir=str(folder / "tokenizers" / "punkt_tab" / "english"))
    return str(folder)
