"""The retrieval systems of sections 4 and 10 over some facts: a B-tree, inverted indexes and an exact vector index.

All except the B-tree find the stored question nearest to the one asked and give its answer, however far away that is;
a threshold on the score can make them give no answer.
"""

import logging
import pickle
import sqlite3
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lamini_jax import Fact

MODULES = ("sklearn", "bm25s", "faiss")  # what the functions of this file import


class Reply(NamedTuple):
    """A system's answer, None or empty if it gives none, and how sure it is of that, on its own scale.

    `known`, for memories only: the share of trained experts among those that the question selected, or 1 if it is in
    the scope of a stored fact and else 0.
    """

    text: str | None
    score: float
    known: float | None = None


class System(NamedTuple):
    """A function that answers questions, and the number of bytes that it keeps for all facts together."""

    answer: Callable[[Sequence[str]], list[Reply]]
    size: int


def b_tree(facts: Sequence[Fact]) -> System:
    """SQLite's B-tree: answers questions exactly as they were stored, and no others."""
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE facts (question TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID")
    database.executemany("INSERT INTO facts VALUES (?, ?)", [(fact.question, fact.answer) for fact in facts])

    def answer(questions):
        query = "SELECT answer FROM facts WHERE question = ?"
        rows = [database.execute(query, (text,)).fetchone() for text in questions]
        return [Reply(row[0], 1.0) if row else Reply(None, 0.0) for row in rows]

    pages, page = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return System(answer, pages * page)


def tfidf(facts: Sequence[Fact], analyzer: str) -> System:
    """scikit-learn's TF-IDF and cosine, of words (analyzer `word`) or of three letters in a row (`char_wb`)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=analyzer, ngram_range=(3, 3) if analyzer == "char_wb" else (1, 1))
    # The inverted index: for each term the facts that have it.
    postings_VF = vectorizer.fit_transform([fact.question for fact in facts]).T.tocsr()

    def scores(questions):
        return (vectorizer.transform(questions) @ postings_VF).toarray()

    return System(_best(facts, scores), len(pickle.dumps((vectorizer, postings_VF))) + _answer_bytes(facts))


def bm25(facts: Sequence[Fact]) -> System:
    """bm25s's inverted index of words."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import turns on more
    index = bm25s.BM25()
    index.index(bm25s.tokenize([fact.question for fact in facts], show_progress=False), show_progress=False)

    def scores(questions):
        tokens = bm25s.tokenize(list(questions), return_ids=False, show_progress=False)
        return np.stack([index.get_scores(words) for words in tokens])

    return System(_best(facts, scores), len(pickle.dumps((index.scores, index.vocab_dict))) + _answer_bytes(facts))


def vector(facts: Sequence[Fact], embed: Callable[[list[str]], np.ndarray]) -> System:
    """faiss's exact inner-product index over unit vectors, which `embed` computes from questions."""
    import faiss

    vectors_FC = np.ascontiguousarray(embed([fact.question for fact in facts]), np.float32)
    index = faiss.IndexFlatIP(vectors_FC.shape[1])
    index.add(vectors_FC)

    def answer(questions):
        scores_B1, ids_B1 = index.search(np.ascontiguousarray(embed(list(questions)), np.float32), 1)
        return [Reply(facts[i].answer, float(score)) for i, score in zip(ids_B1[:, 0], scores_B1[:, 0], strict=True)]

    return System(answer, faiss.serialize_index(index).nbytes + _answer_bytes(facts))


def _best(facts: Sequence[Fact], scores: Callable[[Sequence[str]], np.ndarray]):
    """The answer of the fact with the highest of scores_BF."""

    def answer(questions):
        scores_BF = scores(questions)
        best_B = scores_BF.argmax(axis=1)
        return [Reply(facts[i].answer, float(row_F[i])) for i, row_F in zip(best_B, scores_BF, strict=True)]

    return answer


def _answer_bytes(facts: Sequence[Fact]) -> int:
    return sum(len(fact.answer.encode()) for fact in facts)
