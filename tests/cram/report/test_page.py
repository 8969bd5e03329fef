"""The report page and its pictures, from made-up reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cram.report import plots, style
from cram.report.page import write_page
from cram.report.schema import validate_report
from cram.report.summary import Spread, summarise
from cram.scoring.continual import continual_metrics
from tests.cram.report.pages import Page, write
from tests.cram.report.reports import TASKS, several_seeds, single_seed

PICTURES = {"matrices.png", "curves.png", "ranks_cram.png", "routing_cram.png", "cost.png"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write(folder, single_seed())
    return folder


def test_pictures_are_written_and_open(run_folder: Path) -> None:
    assert {file.name for file in run_folder.glob("*.png")} == PICTURES
    for file in run_folder.glob("*.png"):
        with Image.open(file) as picture:
            assert min(picture.size) > 200
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_page_says_the_numbers_with_their_definitions(run_folder: Path) -> None:
    page = Page((run_folder / "report.html").read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    for expected in (
        "Last = mean over tasks i of a[T][i]", "90.00", "44.67", "BWT = mean over i < T", "−3.00",
        "isolated is told the task at test time", "1 seed.", "3 K", "The expert of each task",
        *TASKS,
    ):  # fmt: skip
        assert expected in words, expected
    assert sum(tag == "svg" for tag, name, _ in page.attributes if name == "viewbox") == len(PICTURES)


def test_page_begins_with_its_conclusion(run_folder: Path) -> None:
    page = Page((run_folder / "report.html").read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    sentence = "After the last task, cram scores 90.0 % on average over all 3 tasks"
    assert words.index(sentence) < words.index("Task order") < words.index("Last (%)")


def test_wide_things_scroll_by_keyboard_and_pictures_are_described(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    regions = re.findall(r'<div class="scroll" tabindex="0" role="region" aria-label="([^"]+)">', text)
    assert len(regions) == text.count("<table") + text.count("<svg")
    assert all(name.endswith(", scrolls sideways") for name in regions)
    described = re.findall(r'<div role="img" aria-label="([^"]+)"><svg', text)
    assert len(described) == text.count("<svg") and all(re.search(r"\d", alt) for alt in described)
    assert "@media (max-width:" in text and ".scroll:focus-visible" in text


def test_the_untrained_base_has_a_row(tmp_path: Path) -> None:
    base = dict(zip(TASKS, (1.5, 2.0, 4.0), strict=True))
    words = " ".join(write(tmp_path, {**single_seed(), "base": base}).text.split())
    assert "base, untrained1.502.004.00" in words and "the untrained base scores 2.5 %." in words


def test_page_is_self_contained(run_folder: Path) -> None:
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    links = [v for _, name, v in Page(text).attributes if name in ("src", "href", "xlink:href", "data")]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"<script|@import|url\((?!#)", text)


def test_several_seeds_are_averaged(tmp_path: Path) -> None:
    page = write(tmp_path, several_seeds())
    words = " ".join(page.text.split())
    assert "3 seeds (numbers are mean ± standard deviation)" in words
    assert "91.00 ± 1.00" in words
    assert "<b>plain</b>" in words, "settings must be shown as text, not as markup"


def test_markup_in_names_is_escaped(tmp_path: Path) -> None:
    report = json.loads(json.dumps(single_seed()).replace("toy", "<script>x</script>"))
    assert "<script>x</script>" in write(tmp_path, report).text


def test_a_method_with_little_to_say_still_gets_a_page(tmp_path: Path) -> None:
    report = {"stream": "toy", "methods": {"sequential": single_seed()["methods"]["sequential"]}}
    page = write(tmp_path, report)
    assert "best number" not in page.text
    assert {file.name for file in tmp_path.glob("*.png")} == {"matrices.png", "curves.png", "cost.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "must contain report.json"), ("{", "must be JSON"), ("{}", "report must be a non-empty object")],
)
def test_faulty_run_folder_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_summary_over_seeds() -> None:
    cram = summarise(validate_report(several_seeds()))[0]
    assert cram.metrics["last"] == Spread(91.0, 1.0)
    assert cram.matrix[2].tolist() == [87.0, 91.0, 95.0]
    assert np.isnan(cram.matrix[0, 1])
    assert cram.deviation[2, 2] == pytest.approx(1.0)
    assert cram.groups == {"colour-ring": [0], "count": [1], "spell": [0]}
    assert list(cram.ranks) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert cram.ranks["k_proj"].tolist() == [[5.0, 9.0]] * 3
    assert cram.routing is not None
    assert cram.routing.gates[1].tolist() == pytest.approx([0.1, 0.8, 0.1])


def test_summary_of_one_seed_has_no_spread() -> None:
    sequential = summarise(validate_report(single_seed()))[1]
    assert sequential.metrics["bwt"].std == 0.0
    assert sequential.ranks == {} and sequential.routing is None


def test_colours_are_stable_and_distinct() -> None:
    colours = style.method_colours(["olora", "cram", "many", "sequential", *"abcdef"])
    assert colours["cram"] == style.METHOD_COLOURS["cram"]
    assert colours["olora"] != colours["many"]
    assert style.method_colours(["cram"])["cram"] == colours["cram"]


@pytest.mark.parametrize(("value", "text"), [(12, "12"), (1234, "1.23 K"), (56.6e6, "56.6 M"), (7e9, "7 G")])
def test_human_count(value: float, text: str) -> None:
    assert plots.human_count(value) == text


def test_wide_rank_maps_get_a_colour_bar_instead_of_numbers() -> None:
    report = single_seed()
    modules = {f"layers.{i}.self_attn.q_proj": 4 + i % 6 for i in range(32)}
    report["methods"]["cram"]["ranks"] = {task: modules for task in TASKS}
    method = summarise(validate_report(report))[0]
    figure = plots.draw_all([method])["ranks_cram"]
    panel, bar = figure.axes
    assert not panel.texts
    assert bar.get_ylabel() == "rank"


def column(page: str, method: str, index: int) -> str:
    """The class and text of a method's cell in the table of results."""
    table = page[page.index("<h2>Results</h2>") : page.index("<h2>Cost</h2>")]
    (row,) = re.findall(rf"</span>{method}</th>(.*?)</tr>", table, re.S)
    return " ".join(re.findall(r'<td class="(number[^"]*)">([^<]*)', row)[index])


def test_the_best_compared_number_of_a_column_is_marked(run_folder: Path) -> None:
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    names = ("cram", "sequential", "isolated")
    lasts = [column(page, name, 0) for name in names]
    assert lasts == ["number best 90.00", "number 44.67", "number 92.67"]
    fallen = [column(page, name, 4) for name in names]
    assert fallen == ["number best 3.00", "number 71.00", "number 0.00"]
    finals = page[page.index("Accuracy on each task at the end") :]
    first = re.findall(r"<tr><th>(\w+)</th><td class=\"(number[^\"]*)\">([^<]*)", finals)
    assert first[:3] == [
        ("cram", "number best", "86.00"),
        ("sequential", "number", "10.00"),
        ("isolated", "number", "90.00"),
    ]


def test_heat_maps_start_at_the_top_and_curves_follow_one_task() -> None:
    methods = summarise(validate_report(single_seed()))
    figures = plots.draw_all(methods)
    heat_map = figures["matrices"].axes[0]
    written = {text.get_position(): text.get_text() for text in heat_map.texts}
    assert (written[(0.5, 0.5)], written[(0.5, 2.5)], written[(2.5, 2.5)]) == ("90", "86", "94")
    assert heat_map.get_ylim() == (3, 0)
    assert [label.get_text() for label in heat_map.get_yticklabels()] == TASKS
    curve = figures["curves"].axes[1].get_lines()[1]
    assert curve.get_label() == "sequential"
    assert curve.get_ydata()[1:].tolist() == [92.0, 30.0]


def test_accuracies_by_task_are_those_of_all_seeds_and_orders(tmp_path: Path) -> None:
    """Each seed learns the tasks in an order of its own; the base's row follows the names as well."""
    rows = {0: [[50.0], [40.0, 60.0], [30.0, 50.0, 70.0]], 1: [[90.0], [80.0, 20.0], [0.0, 10.0, 20.0]]}
    seeds = {}
    for seed, matrix in rows.items():
        method = json.loads(json.dumps(single_seed()["methods"]["sequential"]))
        method.update(matrix=matrix, **continual_metrics(matrix).to_dict())
        method["tasks"] = TASKS[seed:] + TASKS[:seed]
        seeds[str(seed)] = {"sequential": method}
    base = dict(zip(TASKS[::-1], (3.0, 2.0, 1.0), strict=True))
    report = {"stream": "toy", "seeds": seeds, "base": base}
    (summary,) = summarise(validate_report(report))
    assert [final.mean for final in summary.finals] == [25.0, 25.0, 40.0]
    words = " ".join(write(tmp_path, report).text.split())
    assert "base, untrained1.002.003.00" in words
    assert f"Task order of the first seed, one of 2: {' → '.join(TASKS)}." in words
