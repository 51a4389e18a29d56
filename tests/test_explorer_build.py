"""The explorer's site: every number against an independent way to the same, hostile texts, and what is overwritten."""

import json
from collections import Counter

import clvq
import numpy as np
import pytest
import torch
from clvq.cache.sharing.pull import pull
from clvq.cache.sharing.push import push
from clvq.cache.sharing.remote import open_cache
from clvq.errors import ConfigError, RunMismatch
from clvq.explorer.build import CONCEPTS_PER_FILE, TEXTS_PER_FILE, ExploreConfig, explore
from clvq.explorer.data_files import read_script
from clvq.explorer.folder import Site
from clvq.trainer.fit import fit
from clvq.trainer.methods import method_config
from clvq.trainer.run import Run
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.pairwise import cosine_similarity

from .caches import make_cache
from .explorer_maker import EVIDENCE, LABELS, METHODS, make_shown
from .sharing import a_place
from .study_maker import HOSTILE
from .worded import make_worded, train


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Token rows of an encoder, with saliency, predictions, labels, rationales and hostile texts."""
    return make_shown(tmp_path_factory.mktemp("shown"), methods=METHODS, saliency="gradient", saliency_site="hidden.1")


@pytest.fixture(scope="module")
def site(shown, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    explore(shown.cache, shown.runs, out, ExploreConfig(rationale=EVIDENCE, title="<i>Title</i>"))
    return out


@pytest.fixture(scope="module")
def known(shown):
    """What a person would count: each row's text, word, kind and concepts, in plain Python."""
    cache, rows = shown.cache, []
    columns = {name: cache.column(name) for name in ("text", "special", "char_start", "char_end", "saliency")}
    held_out = Run.from_pretrained(shown.runs["km"]).held_out_texts.tolist()
    for place in np.flatnonzero(columns["text"] >= 0).tolist():
        text = int(columns["text"][place])
        index = cache.texts["text_id"].to_pylist().index(text)
        said = cache.texts["text"][index].as_py()
        rows.append(
            {
                "place": place,
                "index": index,
                "special": int(columns["special"][place]),
                "span": (int(columns["char_start"][place]), int(columns["char_end"][place])),
                "word": said[columns["char_start"][place] : columns["char_end"][place]].strip().lower(),
                "label": cache.texts["label"][index].as_py(),
                "train": text not in held_out,
                "saliency": float(columns["saliency"][place]),
            }
        )
    for name, path in shown.runs.items():
        run = Run.from_pretrained(path)
        codes = run.assign(cache.vectors(run.config.lower, np.array([row["place"] for row in rows])))
        for row, code in zip(rows, codes.tolist(), strict=True):
            row[name] = code if row["special"] <= 1 else None
    return rows


def concepts(site, run: str) -> dict:
    """All concepts of a run by code, from their files in the order of the overview."""
    codes = read_script(site, f"{run}/overview")["code"]
    found = {}
    for start in range(0, len(codes), CONCEPTS_PER_FILE):
        part = read_script(site, f"{run}/concepts/{start // CONCEPTS_PER_FILE:02d}")
        assert list(part) == [str(code) for code in codes[start : start + CONCEPTS_PER_FILE]]
        found |= {int(code): concept for code, concept in part.items()}
    return found


def shortened(word: str) -> str:
    return word if len(word) <= 60 else f"{word[:59]}…"


def texts(site) -> list:
    count = read_script(site, "site")["texts"]["count"]
    files = range((count + TEXTS_PER_FILE - 1) // TEXTS_PER_FILE)
    return [text for number in files for text in read_script(site, f"texts/{number:03d}")]


@pytest.mark.parametrize(("id", "name"), [("r0", "km"), ("r1", "sparse"), ("r2", "upper")])
def test_uses_words_labels_and_purity_are_those_of_the_training_rows(shown, site, known, id, name):
    columns, told = read_script(site, f"{id}/overview"), concepts(site, id)
    assert columns["code"] == sorted({row[name] for row in known if row["train"] and row[name] is not None})
    for place, code in enumerate(columns["code"]):
        mine = [row for row in known if row["train"] and row[name] == code]
        assert columns["uses"][place] == len(mine)
        words = Counter(shortened(row["word"]) for row in mine if row["span"][1] > row["span"][0])
        shares = Counter(row["label"] for row in mine if row["label"] is not None)
        said = {word: count for word, count in told[code]["words"] if not word.startswith("‹")}
        assert said.items() <= words.items()
        assert sum(said.values()) == sum(count for _, count in words.most_common(len(said)))
        counts = [count for _, count in told[code]["words"]]
        assert counts == sorted(counts, reverse=True)
        assert columns["words"][place] == [word for word, _ in told[code]["words"][:5]]
        assert columns["top_share"][place] == pytest.approx(counts[0] / len(mine), rel=1e-3)
        if not shares:
            assert columns["purity"][place] is None
            assert told[code]["labels"] == [None, None]
            continue
        wanted = [shares[label] / shares.total() for label in range(2)]
        assert told[code]["labels"] == pytest.approx(wanted, rel=1e-3)
        assert columns["purity"][place] == pytest.approx(max(wanted), rel=1e-3)
        assert columns["label"][place] == wanted.index(max(wanted))


def test_special_tokens_are_called_so(site):
    assert any(word == "‹special token›" for concept in concepts(site, "r0").values() for word, _ in concept["words"])


def test_prediction_shares_are_those_of_the_stored_logits(shown, site, known):
    predicted = shown.cache.logits().argmax(axis=1)
    for code, concept in concepts(site, "r0").items():
        mine = Counter(int(predicted[row["index"]]) for row in known if row["train"] and row["km"] == code)
        assert concept["predictions"] == pytest.approx([mine[0] / mine.total(), mine[1] / mine.total()], rel=1e-3)


def test_typical_sentences_have_the_largest_cosines_and_both_kinds_are_of_the_concept(shown, site, known):
    run = Run.from_pretrained(shown.runs["km"])
    by_place = {(row["index"], row["span"], row["special"]): row for row in known}
    shown_texts, ids = texts(site), Site.read(site).text_ids
    for code, concept in concepts(site, "r0").items():
        kinds = [sentence["kind"] for sentence in concept["sentences"]]
        assert kinds == sorted(kinds, reverse=True)
        assert kinds.count("typical") == kinds.count("random") > 0
        best = None
        for sentence in concept["sentences"]:
            text = shown_texts[sentence["text"]]
            start, end, special = text["rows"][sentence["row"]]
            index = int(shown.cache.text_index[ids[sentence["text"]]])
            row = by_place[index, (start, end), special]
            assert row["km"] == code
            assert row["train"]
            assert (sentence["label"], sentence["prediction"]) == (text["label"], text["prediction"])
            if special == 0 and end > start:
                assert sentence["word"] == text["text"][start:end] or len(sentence["word"]) == 200
            best = row if best is None else best
        members = [row for row in known if row["train"] and row["km"] == code]
        vectors = shown.cache.vectors("hidden.1", np.array([row["place"] for row in members])) - run.lower_mean
        cosines = cosine_similarity(vectors, run.direction(code, "hidden.1"))[:, 0]
        own = cosines[[row["place"] for row in members].index(best["place"])]
        assert own == pytest.approx(cosines.max(), abs=1e-5)


def test_neighbours_are_those_of_a_cosine_table(shown, site):
    run = Run.from_pretrained(shown.runs["km"])
    codes = np.flatnonzero(run.counts > 0)
    directions = np.stack([run.direction(code, "hidden.1")[0] for code in codes.tolist()])
    mean = np.average(run.upper_table, axis=0, weights=run.counts)
    for key, vectors in (("nearest", directions), ("upper_nearest", run.upper_table[codes] - mean)):
        cosines = cosine_similarity(vectors.astype(np.float64))
        np.fill_diagonal(cosines, -2)
        for place, code in enumerate(codes.tolist()):
            found = concepts(site, "r0")[code][key] if place % 7 == 0 else None
            if found is None:
                continue
            assert [cosine for _, cosine in found] == pytest.approx(np.sort(cosines[place])[::-1][:8], abs=1e-3)
            for other, cosine in found:
                assert cosines[place, codes.tolist().index(other)] == pytest.approx(cosine, abs=1e-3)


def test_what_a_concept_decodes_to_is_measured_at_the_upper_site(shown, site, known):
    mine = [row for row in known if row["train"] and row["special"] <= 1]
    upper = shown.cache.vectors("hidden.3", np.array([row["place"] for row in mine])).astype(np.float64)
    mean = upper.mean(axis=0)
    length = np.linalg.norm(upper - mean, axis=1).mean()
    classes = [upper[[row["label"] == label for row in mine]].mean(axis=0) - mean for label in range(2)]
    for code, concept in concepts(site, "r0").items():
        displaced = upper[[row["km"] == code for row in mine]].mean(axis=0) - mean
        assert concept["upper_norm"] == pytest.approx(np.linalg.norm(displaced) / length, rel=1e-3)
        wanted = cosine_similarity(displaced[None], np.stack(classes))[0]
        assert concept["upper_labels"] == pytest.approx(wanted, abs=2e-3)


def test_a_text_shows_its_rows_concepts_saliency_rationale_and_prediction(shown, site, known):
    cache, ids = shown.cache, Site.read(site).text_ids
    logits = cache.logits().astype(np.float64)
    listed = read_script(site, "texts/list")
    for number, text in enumerate(texts(site)):
        index = int(cache.text_index[ids[number]])
        mine = [row for row in known if row["index"] == index]
        assert text["n"] == number
        assert text["text"] == cache.texts["text"][index].as_py()
        assert text["label"] == listed["label"][number] == cache.texts["label"][index].as_py()
        assert text["split"] == listed["splits"][listed["split"][number]] == cache.texts["split"][index].as_py()
        assert text["rows"] == [[*row["span"], row["special"]] for row in mine]
        for id, name in (("r0", "km"), ("r1", "sparse"), ("r2", "upper")):
            assert text["codes"][id] == [row[name] for row in mine]
        assert text["saliency"] == pytest.approx([row["saliency"] for row in mine], rel=1e-3)
        assert text["prediction"] == listed["prediction"][number] == int(logits[index].argmax())
        raised = np.exp(logits[index])
        assert text["probabilities"] == pytest.approx(raised / raised.sum(), rel=1e-3)
        beginning = " ".join(text["text"].split())
        assert beginning.startswith(listed["first"][number].removesuffix("…"))
        assert len(listed["first"][number]) <= 80
        parts = [part.strip() for part in cache.texts[EVIDENCE][index].as_py() if part.strip()]
        inside = {sign for start, end in text["rationale"] or [] for sign in range(start, end)}
        wanted = {
            sign
            for part in parts
            for start in range(len(text["text"]))
            if text["text"].startswith(part, start)
            for sign in range(start, start + len(part))
        }
        assert inside == wanted
        assert (text["rationale"] is None) == (not parts)


def test_held_out_texts_come_first_and_the_limit_leaves_room_for_sentences(shown, tmp_path):
    explore(shown.cache, shown.runs, tmp_path, ExploreConfig(max_texts=12))
    splits = [text["split"] for text in texts(tmp_path)]
    assert splits == ["dev"] * 6 + ["train"] * 6
    numbers = [sentence["text"] for one in concepts(tmp_path, "r0").values() for sentence in one["sentences"]]
    assert None in numbers
    assert {number for number in numbers if number is not None} <= set(range(6, 12))
    # The most used concept's most typical sentence is among those that can be opened.
    columns = read_script(tmp_path, "r0/overview")
    first = columns["code"][int(np.argmax(columns["uses"]))]
    assert concepts(tmp_path, "r0")[first]["sentences"][0]["text"] is not None


def test_the_flow_counts_rows_of_both_concepts(site, known):
    flows = {(one["lower"], one["upper"]): one for one in read_script(site, "flow")}
    assert {pair: one["same_site"] for pair, one in flows.items()} == {
        ("r0", "r1"): True, ("r0", "r2"): False, ("r1", "r2"): False
    }  # fmt: skip
    for (lower, upper), one in flows.items():
        names = [{"r0": "km", "r1": "sparse", "r2": "upper"}[id] for id in (lower, upper)]
        both = [tuple(row[name] for name in names) for row in known if row["special"] <= 1]
        counted = Counter(both)
        assert one["rows"] == len(both)
        assert [rows for *_, rows in one["links"]] == [count for _, count in counted.most_common(200)]
        assert all(counted[first, second] == rows for first, second, rows in one["links"])
        wanted = normalized_mutual_info_score(*zip(*both, strict=True))
        assert one["nmi"] == pytest.approx(wanted, rel=1e-3)


def test_the_site_describes_its_runs_and_their_health(shown, site):
    about = read_script(site, "site")
    assert about["title"] == "<i>Title</i>"
    assert about["classes"] == list(LABELS)
    assert about["made"]["lowers"] == ["hidden.1", "hidden.2"]
    assert about["texts"] == {
        "count": len(texts(site)), "per_shard": TEXTS_PER_FILE, "rationale": True, "saliency": True, "predictions": True
    }  # fmt: skip
    assert [(run["id"], run["name"], run["method"]) for run in about["runs"]] == [
        ("r0", "km", "kmeans"), ("r1", "sparse", "sae"), ("r2", "upper", "kmeans")
    ]  # fmt: skip
    assert not about["live"]
    report = json.loads((shown.runs["km"] / "report.json").read_bytes())
    health = {name: value for name, value, _ in about["runs"][0]["health"]}
    assert health["Own-code error"] == pytest.approx(report["own_code_fvu"], rel=1e-3)
    assert health["Perplexity"] == pytest.approx(report["perplexity"], rel=0.2)
    assert all(explanation for _, _, explanation in about["runs"][0]["health"])


def test_hostile_texts_come_back_as_they_were_and_no_script_holds_a_sign_of_markup(shown, site):
    said = [text["text"] for text in texts(site)]
    for odd in HOSTILE:
        if odd.strip():
            assert any(odd in text for text in said), odd
    for file in (site / "data").rglob("*.js"):
        data = file.read_bytes()
        name = str(file.relative_to(site / "data").with_suffix(""))
        assert data.startswith(f'clvq.receive("{name}",'.encode())
        assert data.endswith(b");\n")
        assert not set(data) & set(b"<>&\x00\x07")
        assert all(byte < 128 for byte in data)


def test_equal_settings_give_equal_bytes_and_leave_the_site_as_it_is(shown, tmp_path):
    for name in ("a", "b"):
        explore(shown.cache, shown.runs, tmp_path / name, ExploreConfig())
    files = {str(file.relative_to(tmp_path / "a")) for file in (tmp_path / "a").rglob("*") if file.is_file()}
    assert "site.json" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    before = (tmp_path / "a" / "data" / "site.js").stat().st_mtime_ns
    again = explore(shown.cache, shown.runs, tmp_path / "a", ExploreConfig())
    assert again.unchanged
    assert (tmp_path / "a" / "data" / "site.js").stat().st_mtime_ns == before
    assert again.texts == again.texts_in_cache == len(texts(tmp_path / "a"))
    assert [run.concepts for run in again.runs] == [
        len(read_script(tmp_path / "a", f"r{place}/overview")["code"]) for place in range(3)
    ]


def test_word_rows_of_a_decoder_with_instructions_and_without_saliency(tmp_path):
    shown = make_shown(
        tmp_path, family="llama", methods=(("km", "kmeans", "hidden.1"),), texts=40, rows="word", task="prompt",
        prompt="say {text} is ", answers=("no", "yes"), answer_names=LABELS,
    )  # fmt: skip
    explore(shown.cache, shown.runs, tmp_path / "site", ExploreConfig())
    about = read_script(tmp_path / "site", "site")
    assert about["texts"]["predictions"]
    assert not about["texts"]["saliency"]
    for text in texts(tmp_path / "site"):
        kinds = [special for *_, special in text["rows"]]
        assert 3 in kinds
        assert [code is None for code in text["codes"]["r0"]] == [kind > 1 for kind in kinds]
        assert text["saliency"] is None
        assert text["rationale"] is None


def test_a_cache_without_predictions_shows_none(tmp_path):
    made = make_worded(tmp_path / "cache", texts=60, predictions=False)
    train(made.cache, tmp_path / "run")
    explore(made.cache, {"run": tmp_path / "run"}, tmp_path / "site", ExploreConfig())
    assert not read_script(tmp_path / "site", "site")["texts"]["predictions"]
    assert all(
        text["prediction"] is None and text["probabilities"] is None and text["label"] in (0, 1)
        for text in texts(tmp_path / "site")
    )
    concept = next(iter(concepts(tmp_path / "site", "r0").values()))
    assert concept["predictions"] == [None, None]
    assert {sentence["prediction"] for sentence in concept["sentences"]} == {None}


@pytest.mark.parametrize("method", ["pca", "mean-difference"])
def test_methods_with_directions_of_their_own_are_shown(shown, tmp_path, method):
    codes = None if method == "mean-difference" else 4
    config = method_config(method, lower="hidden.1", upper="hidden.3", codes=codes, classes=2, held_out="dev")
    fit(shown.cache, config, tmp_path / "run", device=torch.device("cpu"))
    explore(shown.cache, {"run": tmp_path / "run"}, tmp_path / "site", ExploreConfig())
    assert concepts(tmp_path / "site", "r0")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_cache_read_from_elsewhere_gives_the_same_site(shown, site, tmp_path, monkeypatch):
    with a_place("hub", tmp_path, monkeypatch) as elsewhere:
        push(shown.cache.path, elsewhere.url)
        remote = open_cache(elsewhere.url, spool=tmp_path / "spool")
        explore(remote, shown.runs, tmp_path / "site", ExploreConfig(rationale=EVIDENCE, title="<i>Title</i>"))
    for name in ("site", "r0/overview", "texts/000"):
        assert (tmp_path / "site" / "data" / f"{name}.js").read_bytes() == (site / "data" / f"{name}.js").read_bytes()


def test_a_partial_copy_shows_the_texts_that_it_holds(shown, tmp_path):
    push(shown.cache.path, str(tmp_path / "place"))
    pull(str(tmp_path / "place"), tmp_path / "train", splits=["train"])
    explore(clvq.Cache(tmp_path / "train"), {"km": shown.runs["km"]}, tmp_path / "site", ExploreConfig())
    assert {text["split"] for text in texts(tmp_path / "site")} == {"train"}


def test_a_cache_without_its_texts_is_refused_in_one_line(shown, tmp_path):
    push(shown.cache.path, str(tmp_path / "place"), without_texts=True)
    pull(str(tmp_path / "place"), tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"was shared without its texts, which are what is shown: use a whole copy$"):
        explore(clvq.Cache(tmp_path / "copy"), shown.runs, tmp_path / "site", ExploreConfig())


def test_a_field_that_is_not_kept_and_a_run_of_another_cache_are_refused(shown, tmp_path):
    with pytest.raises(ConfigError, match=r"keeps no field 'reason' .*extract with --keep-fields reason"):
        explore(shown.cache, shown.runs, tmp_path / "site", ExploreConfig(rationale="reason"))
    other = make_cache(tmp_path / "other")
    with pytest.raises(RunMismatch, match="the run was trained on the cache"):
        explore(other, shown.runs, tmp_path / "site", ExploreConfig())
