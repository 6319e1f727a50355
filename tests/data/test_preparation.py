"""Preparing data in whatever way, at whatever risk, gives the same cache."""

import dataclasses
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from numina_finetune.config import SourceConfig
from numina_finetune.data.dataset import build_index
from numina_finetune.data.prepare import Drops, IndexOptions, reason_of
from numina_finetune.data.token_index import cap_samples
from numina_finetune.errors import DataError
from tests.conftest import environment
from tests.gcs import gcs
from tests.programs import Program

OPTIONS = IndexOptions(max_seq_length=256)


def row(number):
    return {"question": f"What is {number}+1?", "answer": f"It is {number + 1}.\n#### {number + 1}"}


def talk(*answers):
    rounds = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in answers]
    return {"messages": [message for each in rounds for message in each]}


@pytest.fixture
def source(write_jsonl):
    return SourceConfig(str(write_jsonl("rows.jsonl", [row(number) for number in range(3000)])))


def contents(folder):
    """The files of the one finished cache in a folder."""
    (cache,) = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in cache.iterdir()}


def preparing(source, cache, *options, **env):
    """The command in a process of its own."""
    words = ["data", "prepare", "--dataset-name", source.name, "--model-name", "tiny-qwen3"]
    words += ["--max-seq-length", "256", "--cache-dir", str(cache), *options]
    return Program("numina_finetune", *words, env=environment(**env))


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_worker_processes_give_the_same_index(source, tiny, tmp_path):
    alone = build_index([source], tiny, OPTIONS, tmp_path / "one", workers=1)
    together = build_index([source], tiny, OPTIONS, tmp_path / "two", workers=2)
    assert together.data_key == alone.data_key and len(alone) == 3000
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_streamed_rows_give_the_same_index(source, tiny, tmp_path):
    copied = build_index([source], tiny, OPTIONS, tmp_path / "copied")
    streamed = build_index([source], tiny, OPTIONS, tmp_path / "streamed", streaming=True)
    assert streamed.data_key == copied.data_key
    assert contents(tmp_path / "copied") == contents(tmp_path / "streamed")


def test_preparation_killed_at_any_moment_and_run_again_gives_the_same_cache(source, tmp_path):
    reference = finished(preparing(source, tmp_path / "reference"))
    started = time.monotonic()
    finished(preparing(source, tmp_path / "timed"))
    life = time.monotonic() - started
    rng = random.Random(0)
    for number in range(3):
        process = preparing(source, tmp_path / "killed")
        time.sleep(life * (0.4 + 0.6 * rng.random()) if number else life * 0.8)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert finished(preparing(source, tmp_path / "killed")) == reference
    assert contents(tmp_path / "killed") == contents(tmp_path / "reference")
    assert not list((tmp_path / "killed").glob(".*-*")), "leftovers of the killed ones are gone"


def test_two_preparations_at_once_give_one_cache(source, tmp_path):
    processes = [preparing(source, tmp_path / "shared") for _ in range(2)]
    outputs = [finished(process) for process in processes]
    said = [output.replace("another process is preparing this data: waiting for it\n", "") for output in outputs]
    assert said[0] == said[1]
    assert len(contents(tmp_path / "shared")) == 5


def test_cache_in_the_cloud_is_built_once_and_fetched_by_the_next_machine(source, tmp_path):
    with gcs() as service:
        url = f"{service.url}/cache"
        outputs = []
        for machine in ("one", "two"):
            env = {**service.environment, "XDG_CACHE_HOME": str(tmp_path / machine)}
            outputs.append(finished(preparing(source, url, **env)))
    assert outputs[0] == outputs[1]
    one, two = (contents(tmp_path / machine / "numina_finetune") for machine in ("one", "two"))
    assert one == two and len(one) == 5


@pytest.mark.parametrize("how", ["drop", "truncate", "split-error"])
def test_overlong_conversations_are_never_cut_inside_a_turn(write_jsonl, tiny, tmp_path, how):
    rows = [talk("short"), talk("first", "second " * 40, "third"), talk("never fits " * 40)]
    source = SourceConfig(str(write_jsonl("long.jsonl", rows)))
    options = dataclasses.replace(OPTIONS, overlong=how)
    if how == "split-error":
        with pytest.raises(DataError, match=r"2 rows .* more tokens than --max-seq-length 256 \(row 1 \(\d+ tokens\)"):
            build_index([source], tiny, options, tmp_path)
        return
    index = build_index([source], tiny, options, tmp_path)
    (report,) = index.report["sources"]
    samples = [tiny.decode(ids[mask]) for ids, mask in map(index.sample, range(len(index)))]
    assert samples == ["short<|im_end|>", *(["first<|im_end|>"] if how == "truncate" else [])]
    assert report["truncated"] == (how == "truncate")
    (entry,) = report["dropped"].values()
    assert entry["count"] == (1 if how == "truncate" else 2)


def test_benchmark_questions_are_counted_and_dropped_on_demand(write_jsonl, tiny, tmp_path):
    rows = [row(number) for number in range(20)]
    benchmark = str(write_jsonl("benchmark.jsonl", [row(3), row(500)]))
    source = SourceConfig(str(write_jsonl("rows.jsonl", rows)))
    counted = build_index([source], tiny, dataclasses.replace(OPTIONS, against=(benchmark,)), tmp_path)
    assert len(counted) == 20
    assert counted.report["sources"][0]["overlaps"] == {f"{benchmark} (exact)": 1}
    clean = build_index(
        [source], tiny, dataclasses.replace(OPTIONS, against=(benchmark,), decontaminate=True), tmp_path
    )
    ((reason, entry),) = clean.report["sources"][0]["dropped"].items()
    assert len(clean) == 19 and entry["count"] == 1 and "contaminated" in reason and benchmark in reason
    assert entry["examples"][0]["row"] == 3 and json.loads(entry["examples"][0]["content"]) == row(3)


def test_a_cap_keeps_so_many_samples_of_its_source_whatever_their_order(source, write_jsonl, tiny, tmp_path):
    backwards = SourceConfig(str(write_jsonl("back.jsonl", [row(number) for number in reversed(range(3000))])))
    other = SourceConfig(str(write_jsonl("other.jsonl", [row(number) for number in range(5000, 5010)])))

    def kept(first):
        index = cap_samples(build_index([first, other], tiny, OPTIONS, tmp_path / "cache"), [50, None], seed=7)
        assert np.bincount(index.sources).tolist() == [50, 10]
        return {index.sample(number)[0].tobytes() for number in range(len(index))}, index.data_key

    (one, key), (two, _) = kept(source), kept(backwards)
    assert one == two
    whole = build_index([source, other], tiny, OPTIONS, tmp_path / "cache")
    assert key != whole.data_key and cap_samples(whole, [None, 10], seed=7).data_key == whole.data_key


def test_equal_problems_are_one_reason_and_their_first_rows_the_examples():
    drops = Drops()
    for number in range(5):
        drops.add(number, {"a": number}, f"messages[{number}].content: {str(number)!r} is no text")
    ((reason, entry),) = drops.summary().items()
    assert reason == reason_of("messages[0].content: '0' is no text")
    assert entry["count"] == 5 and [example["row"] for example in entry["examples"]] == [0, 1, 2]


def test_endless_reasons_end_in_one():
    drops, more = Drops(), Drops()
    for number in range(300):
        drops.add(number, {}, f"reason {'x' * number}")
        more.add(number, {}, f"cause {'x' * number}")
    drops.merge(more)
    assert sum(drops.counts.values()) == 600 and len(drops.counts) == 201
    assert drops.counts["other reasons"] == 400


def test_lone_surrogates_of_a_refused_row_can_be_written_down():
    drops = Drops()
    drops.add(0, {"question": "\ud800"}, "'\ud800' is no text \ud800")
    json.dumps(drops.summary(), ensure_ascii=False).encode("utf-8")


def test_workers_do_not_outlive_a_killed_preparation(write_jsonl, tmp_path):
    source = SourceConfig(str(write_jsonl("many.jsonl", [row(number) for number in range(60_000)])))
    process = preparing(source, tmp_path / "cache", "--preprocessing-num-workers", "2")
    deadline = time.monotonic() + 120
    while len(workers := spawned_by(process.pid)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def spawned_by(parent):
    """The worker processes of a process; not the one that tracks its resources."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, command in commands.items() if b"spawn_main" in command]


def alive(process):
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_tir_is_recognised_though_its_first_row_has_no_code(write_jsonl, tiny, tmp_path):
    code = "Compute.\n```python\nprint(4)\n```\n```output\n4\n```\nIt is 4."
    rows = [{"problem": "p", "solution": "Just 4."}, {"problem": "q", "solution": code}]
    index = build_index([SourceConfig(str(write_jsonl("tir.jsonl", rows)))], tiny, IndexOptions(4096), tmp_path)
    assert index.report["sources"][0]["format"] == "numina_tir" and len(index) == 2
    assert tiny.decode(index.sample(0)[0]).count("<|im_start|>") == 2
