import dataclasses
import json
import logging
import os
import shutil

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.data import prepare
from numina_finetune.data import sources as sources_module
from numina_finetune.data.dataset import build_index, tokenizer_hash
from numina_finetune.data.prepare import IndexOptions
from numina_finetune.data.sources import load_rows, parse_source_name, preflight
from numina_finetune.data.token_index import split_validation
from numina_finetune.errors import DataError

OPTIONS = IndexOptions(max_seq_length=1024)
ROWS = [{"question": f"{n}+1?", "answer": f"{n}+1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(40)]


@pytest.fixture
def gsm8k(write_jsonl):
    return SourceConfig(str(write_jsonl("gsm8k.jsonl", ROWS)))


def arrays(index):
    return [np.asarray(a).tolist() for a in (index.input_ids, index.loss_mask, index.offsets, index.source_of)]


@pytest.mark.parametrize(
    ("name", "parsed"),
    [("a/b", ("a/b", None)), ("a/b[test]", ("a/b", "test")), ("x.jsonl[train[:10%]]", ("x.jsonl", "train[:10%]"))],
)
def test_source_name_may_name_its_split(name, parsed):
    assert parse_source_name(name) == parsed


def test_index_holds_every_row_rendered(gsm8k, tiny, tmp_path):
    index = build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")
    assert len(index) == 40
    ids, mask = index.sample(3)
    assert tiny.decode(ids[mask]) == "3+1 = 4\n#### 4<|im_end|>"
    (report,) = index.report["sources"]
    assert report["rows"] == report["kept"] == 40 and report["format"] == "gsm8k" and report["dropped"] == {}
    assert report["tokens"] == len(index.input_ids) and report["supervised_tokens"] == index.loss_mask.sum()
    assert report["length_quantiles"]["max"] == index.lengths.max()


def test_second_run_reads_the_cache_and_never_the_tokenizer(gsm8k, tiny, tmp_path, monkeypatch):
    first = build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")
    monkeypatch.setattr(prepare, "renderer", lambda *_: pytest.fail("tokenised again"))
    again = build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")
    assert again.data_key == first.data_key and arrays(again) == arrays(first)


def test_changed_file_of_the_same_size_and_time_is_read_anew(gsm8k, tiny, tmp_path, write_jsonl):
    first = build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")
    stat = (tmp_path / "gsm8k.jsonl").stat()
    path = write_jsonl("gsm8k.jsonl", [{**ROWS[1]}, *ROWS[1:]])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    changed = build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")
    assert changed.data_key != first.data_key
    assert changed.sample(0)[0].tolist() == changed.sample(1)[0].tolist()


def test_loading_a_changed_file_of_the_same_time_gives_its_new_rows(gsm8k, tmp_path, write_jsonl):
    load_rows(gsm8k, tmp_path / "arrow")
    stat = (tmp_path / "gsm8k.jsonl").stat()
    path = write_jsonl("gsm8k.jsonl", ROWS[:7])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_rows(gsm8k, tmp_path / "arrow").to_list() == ROWS[:7]


def test_data_key_names_the_tokens_wherever_they_come_from(gsm8k, tiny, tmp_path, write_jsonl):
    elsewhere = SourceConfig(str(write_jsonl("other/copy.jsonl", ROWS)), format="gsm8k")
    one = build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")
    two = build_index([elsewhere], tiny, OPTIONS, tmp_path / "cache2")
    annotated = build_index([gsm8k], tiny, dataclasses.replace(OPTIONS, gsm8k_style="annotated"), tmp_path / "cache")
    assert one.data_key == two.data_key != annotated.data_key


def test_nothing_half_built_is_left_when_building_fails(gsm8k, tiny, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "renderer", broken)
    with pytest.raises(KeyboardInterrupt):
        build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_damaged_cache_is_refused_with_its_folder(gsm8k, tiny, tmp_path):
    build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    (folder / "offsets.npy").unlink()
    with pytest.raises(DataError, match=folder.name):
        build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache")


def test_dropped_rows_are_counted_by_reason_with_an_example(tiny, tmp_path, write_jsonl):
    bad = [{"question": "q", "answer": "no final line"}, {"question": "q", "answer": "#### 1\n#### 2\n#### 3"}]
    source = SourceConfig(str(write_jsonl("mixed.jsonl", [*ROWS[:3], *bad])), format="gsm8k")
    (report,) = build_index([source], tiny, OPTIONS, tmp_path / "cache").report["sources"]
    ((reason, entry),) = report["dropped"].items()
    assert report["kept"] == 3 and entry["count"] == 2
    assert "####" in reason and [example["row"] for example in entry["examples"]] == [3, 4]
    assert json.loads(entry["examples"][1]["content"]) == bad[1]


def test_overlong_samples_are_dropped_and_counted(tiny, tmp_path, write_jsonl):
    source = SourceConfig(str(write_jsonl("long.jsonl", [*ROWS[:2], {"question": "q", "answer": "x" * 1500}])))
    index = build_index([dataclasses.replace(source, format="qa")], tiny, OPTIONS, tmp_path / "cache")
    assert len(index) == 2 and index.lengths.max() <= 1024
    assert "--max-seq-length" in next(iter(index.report["sources"][0]["dropped"]))


def test_source_that_gives_nothing_is_an_error_with_the_reasons(gsm8k, tiny, tmp_path, write_jsonl):
    rows = [{"problem": "p", "solution": "s", "answer": "proof", "problem_is_valid": "Yes", "solution_is_valid": "Yes"}]
    source = SourceConfig(str(write_jsonl("proofs.jsonl", rows)))
    with pytest.raises(DataError, match=r"proofs\.jsonl.*numina_1\.5.*proof"):
        build_index([gsm8k, source], tiny, OPTIONS, tmp_path / "cache")


def test_samples_remember_their_source(gsm8k, tiny, tmp_path, write_jsonl):
    chat = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    sources = [gsm8k, SourceConfig(str(write_jsonl("chat.jsonl", chat)))]
    assert build_index(sources, tiny, OPTIONS, tmp_path / "cache").sources.tolist() == [0] * 40 + [1]


def test_keys_that_arrow_adds_do_not_reach_the_tokens(tiny, tmp_path, write_jsonl):
    def tool(**properties):
        return {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}

    def row(properties, **more):
        answer = {"role": "assistant", "content": "a", **more}
        return {"messages": [{"role": "user", "content": "q"}, answer], "tools": [tool(**properties)]}

    plain, other = row({"x": {"type": "string"}}), row({"y": {"type": "number"}}, name="n")
    Dataset.from_list([plain, other]).to_parquet(tmp_path / "unified.parquet")  # every row has x, y and name now
    index = build_index([SourceConfig(str(tmp_path / "unified.parquet"))], tiny, OPTIONS, tmp_path / "cache")
    alone = build_index([SourceConfig(str(write_jsonl("alone.jsonl", [plain])))], tiny, OPTIONS, tmp_path / "cache")
    assert tiny.decode(index.sample(0)[0]) == tiny.decode(alone.sample(0)[0])


# --- loading


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "folder of files", "saved", "saved with splits"])
def test_every_local_form_gives_the_same_rows(form, tmp_path, write_jsonl):
    rows, path = Dataset.from_list(ROWS), tmp_path / f"data.{form}"
    if form == "parquet":
        rows.to_parquet(path)
    elif form == "saved":
        rows.save_to_disk(path)
    elif form == "saved with splits":
        DatasetDict(train=rows.select([0]), test=rows).save_to_disk(path)
    elif form == "folder of files":
        write_jsonl("data.folder of files/test.jsonl", ROWS)
        write_jsonl("data.folder of files/train.jsonl", ROWS[:1])
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    else:
        write_jsonl("data.jsonl", ROWS)
    source = SourceConfig(str(path), split="test")
    assert preflight([source], RunConfig()) == []
    assert load_rows(source, tmp_path / "arrow").to_list() == ROWS


def test_split_slices_are_understood(gsm8k, tmp_path):
    assert len(load_rows(dataclasses.replace(gsm8k, split="train[:10%]"), tmp_path / "arrow")) == 4


def test_synthetic_data_needs_no_file(tmp_path):
    rows = load_rows(SourceConfig("synthetic-gsm8k", split="test"))
    assert set(rows.column_names) == {"question", "answer"} and len(rows) > 0


def test_synthetic_data_has_slices():
    whole, part = (load_rows(SourceConfig("synthetic-gsm8k", split=split)) for split in ("test", "test[8:12]"))
    assert part.to_list() == whole.to_list()[8:12]
    with pytest.raises(DataError, match=r"split 'test\[:x\]' of synthetic-gsm8k: .*write it as in train"):
        load_rows(SourceConfig("synthetic-gsm8k", split="test[:x]"))
    with pytest.raises(DataError, match="is several: name one of them"):
        load_rows(SourceConfig("synthetic-gsm8k", split="train[:3]+test[:3]"))


def test_gsm8k_on_the_hub_gets_its_main_configuration_and_alias(monkeypatch, caplog):
    asked = {}
    monkeypatch.setattr("datasets.load_dataset", lambda **arguments: asked.update(arguments))
    sources_module._notice_alias.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_rows(SourceConfig("gsm8k"))
        load_rows(SourceConfig("gsm8k"))
    assert asked == {"path": "openai/gsm8k", "name": "main", "revision": None, "split": "train", "streaming": False}
    assert len(caplog.records) == 1 and "openai/gsm8k" in caplog.text


def test_unknown_hub_name_is_a_data_error_and_a_time_out_is_not(monkeypatch):
    def fail(error):
        def load(**_):
            raise error

        monkeypatch.setattr("datasets.load_dataset", load)

    fail(DatasetNotFoundError("no such dataset"))
    with pytest.raises(DataError, match="no/such"):
        load_rows(SourceConfig("no/such"))
    fail(ConnectionError("timed out"))
    with pytest.raises(ConnectionError):
        load_rows(SourceConfig("no/such"))


# --- preflight


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data/trian.jsonl", ("data/trian.jsonl", "does not exist")),
        ("./nowhere", ("./nowhere", "does not exist")),
        ("two words", ("two words", "hub name")),
    ],
)
def test_preflight_names_what_is_not_there(name, words):
    (fault,) = preflight([SourceConfig(name)], RunConfig())
    assert all(word in fault for word in words)


def test_preflight_finds_the_faults_of_all_sources_at_once(gsm8k, tmp_path, write_jsonl):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "table.xlsx").touch()
    write_jsonl("folder/train.jsonl", ROWS)
    sources = [
        gsm8k,
        dataclasses.replace(gsm8k, answer_field="reply"),
        SourceConfig(str(tmp_path / "empty.jsonl")),
        SourceConfig(str(tmp_path / "broken.parquet")),
        SourceConfig(str(tmp_path / "table.xlsx")),
        SourceConfig(str(tmp_path / "folder"), split="test"),
        SourceConfig("synthetic-gsm8k", split="validation"),
        dataclasses.replace(gsm8k, format="gsmk"),
    ]
    faults = preflight(sources, RunConfig(eval_dataset_name="./eval.jsonl"))
    expected = ["'reply'", "is empty", "cannot be read", ".xlsx", "'test'", "'validation'", "'gsmk'"]
    expected.append("--eval-dataset-name ./eval.jsonl")
    assert len(faults) == len(expected)
    assert all(word in fault for word, fault in zip(expected, faults, strict=True))


def test_preflight_asks_no_network_about_hub_names():
    assert preflight([SourceConfig("AI-MO/NuminaMath-CoT")], RunConfig()) == []


# --- validation split and tokenizer hash


def test_validation_split_is_a_stable_partition_that_keeps_equal_samples_together(tiny, tmp_path, write_jsonl):
    index = build_index([SourceConfig(str(write_jsonl("r.jsonl", ROWS + ROWS)))], tiny, OPTIONS, tmp_path / "cache")
    train, validation = split_validation(index, 0.25, seed=1)
    again = split_validation(index, 0.25, seed=1)[1]
    assert sorted([*train.members, *validation.members]) == list(range(80))
    assert again.members.tolist() == validation.members.tolist() and again.data_key == validation.data_key
    assert 20 <= len(validation) <= 21 + 1 and train.data_key != validation.data_key
    questions = [
        {index.input_ids[index.offsets[m] : index.offsets[m + 1]].tobytes() for m in part.members}
        for part in (train, validation)
    ]
    assert not questions[0] & questions[1]
    assert split_validation(index, 0.25, seed=2)[1].members.tolist() != validation.members.tolist()


@pytest.mark.parametrize("size", [80, 0.001])
def test_validation_size_that_empties_a_part_is_refused(gsm8k, tiny, tmp_path, size):
    with pytest.raises(DataError, match="--validation-size"):
        split_validation(build_index([gsm8k], tiny, OPTIONS, tmp_path / "cache"), size, seed=0)


def test_tokenizer_hash_follows_content_not_use(tiny):
    before = tokenizer_hash(tiny)
    tiny(["a", "bb"], padding=True, truncation=True, max_length=5)
    assert tokenizer_hash(tiny) == before
    template, tiny.chat_template = tiny.chat_template, "{{ messages }}"
    try:
        assert tokenizer_hash(tiny) != before
    finally:
        tiny.chat_template = template


# --- real data


@pytest.mark.parametrize(("split", "kept"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_row_renders_and_verifies(real_data, qwen3, tmp_path, split, kept):
    shutil.copytree(real_data / "gsm8k", tmp_path / "gsm8k")
    source = SourceConfig(str(tmp_path / "gsm8k"), split=split)
    assert len(build_index([source], qwen3, IndexOptions(max_seq_length=512), tmp_path / "cache")) == kept
