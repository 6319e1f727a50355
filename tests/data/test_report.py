import json
import re

import numpy as np
import pytest
from matplotlib import image

from numina_finetune.data.report import CONTENT_SHOWN, summary_lines, write_report


def source(name, lengths, dropped=None, supervised=0.5, **extra):
    """What became of one source's rows, with so many tokens in each kept one."""
    dropped = dropped or {}
    quantiles = np.quantile(lengths, [0.5, 0.99, 1], method="nearest").tolist() if len(lengths) else []
    return {
        "name": name,
        "split": "train",
        "format": "qa",
        "rows": len(lengths) + sum(drop["count"] for drop in dropped.values()),
        "kept": len(lengths),
        "truncated": 0,
        "dropped": dropped,
        "tokens": int(sum(lengths)),
        "supervised_tokens": int(sum(lengths) * supervised),
        "length_quantiles": dict(zip(("p50", "p99", "max"), quantiles, strict=False)),
        **extra,
    }


def index(*sources):
    """The report and the samples of an index."""
    totals = {name: sum(source[name] for source in sources) for name in ("kept", "tokens", "supervised_tokens")}
    return {"data_key": "0123abcd", **totals, "sources": list(sources)}


def drop(count, problem="content: missing", content="{}", row=7):
    return {"count": count, "examples": [{"row": row, "problem": problem, "content": content}]}


def written(folder, report, lengths, source_of=None, *, rows=10, seq_len=128):
    lengths = np.asarray(lengths, dtype=np.int64)
    source_of = np.zeros(len(lengths), np.int16) if source_of is None else np.asarray(source_of, np.int16)
    paths = write_report(report, lengths, source_of, rows, seq_len, folder)
    assert [path.name for path in paths] == ["data_report.json", "data_report.md", "lengths.png"]
    assert sorted(folder.iterdir()) == sorted(paths)
    return json.loads(paths[0].read_text("utf-8")), paths[1].read_text("utf-8"), image.imread(paths[2])


def cells(markdown, heading):
    """The lines of the table under a heading, split into cells as a renderer does it."""
    section = markdown.split(f"## {heading}\n\n", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in section.splitlines()]


def near(picture, color):
    """Pixels of about this colour."""
    return int((np.abs(picture[..., :3] * 255 - np.array(color)).max(axis=-1) < 12).sum())


def test_files_say_how_full_the_rows_are_and_what_share_is_supervised(tmp_path):
    lengths = [100, 60, 40]
    report = index(source("a", lengths, supervised=0.25))
    data, markdown, _ = written(tmp_path, report, lengths, rows=2, seq_len=128)
    assert data["sources"] == report["sources"] and data["data_key"] == "0123abcd"
    assert (data["fill"], data["supervised_share"]) == (200 / 256, 0.25)
    assert "2 rows of 128 tokens, 78.1 % full" in markdown and "0123abcd" in markdown


def test_tables_hold_each_sources_counts_and_their_sums(tmp_path):
    a = source("a", [1500, 500], {"no answer": drop(2), "empty": drop(3)}, truncated=1)
    b = source("b", [100], supervised=1.0)
    _, markdown, _ = written(tmp_path, index(a, b), [1500, 500, 100], [0, 0, 1], seq_len=2048)
    assert cells(markdown, "Rows")[2:] == [
        [r"a\[train\]", "qa", "7", "2", "1", "5"],
        [r"b\[train\]", "qa", "1", "1", "0", "0"],
        ["all", "", "8", "3", "1", "5"],
    ]
    assert cells(markdown, "Tokens")[2:] == [
        [r"a\[train\]", "2,000", "1,000", "50.0 %", "500", "1,500", "1,500"],
        [r"b\[train\]", "100", "100", "100.0 %", "100", "100", "100"],
        ["all", "2,100", "1,100", "52.4 %", "", "", ""],
    ]
    assert cells(markdown, "Dropped rows")[2:] == [
        [r"a\[train\]", "empty", "3", "42.9 %"],
        [r"a\[train\]", "no answer", "2", "28.6 %"],
    ]


def test_problems_and_names_cannot_break_a_table(tmp_path):
    reason = "a | b\n# c `d` <img> $x_1$ \\"
    _, markdown, _ = written(tmp_path, index(source("x|y", [10], {reason: drop(1, problem=reason)})), [10])
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.split(r"(?<!\\)\|", line)) in (6, 8, 9) for line in tables)
    (line,) = cells(markdown, "Dropped rows")[2:]
    assert re.sub(r"\\(.)", r"\1", line[1]) == "a | b # c `d` <img> $x_1$ \\"
    assert not re.search(r"(?<!\\)<img", markdown)


def test_refused_rows_stand_in_blocks_that_their_content_cannot_end(tmp_path):
    content = 'first\n```python\nprint("````")\n```\n# not a heading \x1b[2J'
    dropped = {"unclosed fence": drop(4, "row: unclosed fence", content, row=1234)}
    _, markdown, _ = written(tmp_path, index(source("a", [10], dropped)), [10])
    heading, row, block = markdown.split("### ", 1)[1].split("\n\n", 2)
    assert heading == r"a\[train\]: unclosed fence"
    assert row == "Row 1,234: row: unclosed fence"
    opening, *inside, closing = block.rstrip("\n").splitlines()
    assert opening == "`````text" and closing == "`````"
    assert "\n".join(inside) == content.replace("\x1b", r"\x1b")


def test_long_content_is_cut_and_says_so(tmp_path):
    report = index(source("a", [10], {"too long": drop(1, content="x" * (CONTENT_SHOWN + 1500))}))
    _, markdown, _ = written(tmp_path, report, [10])
    assert f"{'x' * CONTENT_SHOWN} … (1,500 characters more)\n" in markdown


def test_overlaps_with_benchmarks_are_reported_where_there_are_any(tmp_path):
    report = index(source("a", [10] * 8, overlaps={"gsm8k:test (exact)": 2}))
    _, markdown, _ = written(tmp_path / "with", report, [10] * 8)
    assert cells(markdown, "Overlaps with benchmarks")[2:] == [[r"a\[train\]", "gsm8k:test (exact)", "2", "25.0 %"]]
    assert "  2 rows overlap with gsm8k:test (exact)" in summary_lines(report, 1, 128)
    assert "Overlaps" not in written(tmp_path / "without", index(source("a", [10])), [10])[1]


def test_picture_shows_every_source_and_the_row_length(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 100, 500), rng.integers(200, 400, 500)])
    report = index(source("short", lengths[:500]), source("long", lengths[500:]))
    _, _, picture = written(tmp_path, report, lengths, np.repeat([0, 1], 500), seq_len=1024)
    blue, orange, crimson = (31, 119, 180), (255, 127, 14), (220, 20, 60)
    assert all(near(picture, color) > 100 for color in (blue, orange, crimson))
    columns = np.flatnonzero((np.abs(picture[..., :3] * 255 - np.array(crimson)).max(axis=-1) < 12).sum(axis=0) > 100)
    assert len(columns) and columns.min() > 0.9 * picture.shape[1]  # the longest row is the right edge


def test_samples_left_out_of_training_are_not_counted_into_the_fill(tmp_path):
    report = index(source("a", [100] * 6))
    data, markdown, _ = written(tmp_path, report, [100] * 3, rows=3, seq_len=125)
    assert data["fill"] == 0.8 and data["samples"] == 3
    assert "3 of the samples" in markdown
    assert "80.0 % full" in summary_lines(report, 3, 125, tokens=300)[-1]


@pytest.mark.parametrize("sources", [[], [source("a", [], {"empty": drop(3)})]])
def test_report_of_no_sample_at_all_is_still_written(tmp_path, sources):
    data, markdown, _ = written(tmp_path, index(*sources), [], rows=0)
    assert (data["fill"], data["supervised_share"]) == (0, 0)
    assert "0.0 % full" in markdown


def test_summary_names_counts_and_the_commonest_reasons():
    dropped = {f"reason {number}": drop(number) for number in range(1, 8)}
    lines = summary_lines(index(source("gsm8k", [1000, 2000], dropped, truncated=1)), 2, 2048)
    assert lines[0] == "gsm8k[train]: 30 rows, 2 kept (1 truncated), 28 dropped"
    assert lines[1:6] == [f"  {number} dropped: reason {number}" for number in (7, 6, 5, 4, 3)]
    assert lines[6] == "  3 dropped for 2 other reasons"
    assert "p50" in lines[7] and "max 2,000" in lines[7]
    assert lines[-2] == "3,000 tokens, 50.0 % of them supervised"
    assert lines[-1] == "an epoch is 2 rows of 2,048 tokens, 73.2 % full; data key 0123abcd"


def test_summary_cannot_steer_the_terminal():
    lines = summary_lines(index(source("a\x1b[2J", [5], {"bad\x07\nrow": drop(1)})), 1, 128)
    assert all(line.isprintable() for line in lines)
