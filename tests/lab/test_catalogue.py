"""Reading rows: what a good file gives, and one clear sentence for each bad one."""

import json

import pytest

from varan.lab.catalogue import CatalogueError, Check, load

PLANNED = """
[[row]]
number = 7
id = "planned-row"
title = "A plan"
pages = ["000"]
state = "planned"
"""

BUILT = """
[[row]]
number = 21
id = "built-row"
title = "A thing"
pages = ["000", "001"]
state = "built"
authors = ["Ada Example"]
year = 2024
arxiv = "2401.12253"
claim = "It works."
method = ["varan.transport:sinkhorn"]
precision = "float64"
data = "digits"
baselines = ["plain descent"]
certificate = "The duality gap, proved."
differences = []
[row.scales.smoke]
seeds = 1
n = 20
[row.scales.laptop]
seeds = 5
n = 200
[row.scales.paper]
seeds = 5
n = 2000
[[row.checks]]
name = "gain"
quantity = "ratio"
relation = ">="
threshold = 5
statistic = "median"
source = "Table 1"
smoke_threshold = 2.0
"""


def read(folder, text, topic="transport"):
    (folder / topic).mkdir(exist_ok=True)
    (folder / topic / "rows.toml").write_text(text, encoding="utf-8")
    return load(folder)


def test_a_built_row(tmp_path):
    catalogue = read(tmp_path, PLANNED + BUILT)
    row = catalogue.find("built-row")
    assert [r.number for r in catalogue.rows] == [7, 21]
    assert row.topic == "transport"
    assert row.module == "varan.claims.transport.built_row"
    assert row.scales["smoke"].seeds == 1
    assert dict(row.scales["laptop"].settings) == {"n": 200}
    check = Check("gain", "ratio", ">=", 5.0, "median", "Table 1", True, 2.0)
    assert row.checks == (check,)
    assert check.threshold_at("smoke") == 2.0
    assert check.threshold_at("laptop") == 5.0
    assert json.loads(json.dumps(row.to_dict()))["scales"]["paper"]["n"] == 2000


def test_numbers_and_ids_find_the_same_row(tmp_path):
    catalogue = read(tmp_path, PLANNED + BUILT)
    for reference in ("built-row", "21", "021"):
        assert catalogue.find(reference).number == 21


def test_unknown_references_name_the_nearest(tmp_path):
    catalogue = read(tmp_path, PLANNED + BUILT)
    with pytest.raises(CatalogueError, match=r"no row 'buildrow'. Nearest: built-row"):
        catalogue.find("buildrow")
    with pytest.raises(CatalogueError, match=r"no row with number 99.*7 to 21"):
        catalogue.find("99")
    with pytest.raises(CatalogueError, match=r"no topic 'transprt'. Nearest: transp"):
        catalogue.select(topic="transprt")
    assert catalogue.select("transport", "built") == (catalogue.find("21"),)


# What is wrong: text replaced, replacement, and what the sentence must say.
BAD = {
    "missing field": ('claim = "It works."\n', "", "row 21, field `claim`: is missing"),
    "unknown field": (
        "baselines =",
        "basline =",
        r"row 21: has no field `basline`. Nearest: baselines",
    ),
    "wrong kind": (
        "year = 2024",
        'year = "2024"',
        r"row 21, field `year`: must be a year \(got '2024'\)",
    ),
    "boolean for a number": (
        "threshold = 5\n",
        "threshold = true\n",
        "row 21, check 1, field `threshold`: must be a number.*got True",
    ),
    "state": (
        'state = "built"',
        'state = "done"',
        r"row 21, field `state`: must be one of 'planned', 'built' \(got 'done'\)",
    ),
    "relation": (
        '">="',
        '"atleast"',
        r"row 21, check 1, field `relation`: must be one of '>=', '<=', 'in'",
    ),
    "statistic": ('"median"', '"mode"', "row 21, check 1, field `statistic`"),
    "id": ('"built-row"', '"Built Row"', "row 21, field `id`: must be.*kebab-case"),
    "page": ('"001"', '"1"', "row 21, field `pages`.*page of three digits"),
    "arxiv": ('"2401.12253"', '"see web"', "row 21, field `arxiv`: must be an arXiv"),
    "method": (
        "varan.transport:sinkhorn",
        "os:system",
        "row 21, field `method`.*'varan.topic:name'",
    ),
    "no authors": ('["Ada Example"]', "[]", "row 21, field `authors`: must not be emp"),
    "pair for a number": (
        "threshold = 5\n",
        "threshold = [1, 2]\n",
        r"field `threshold`: must be a number for the relation \">=\"",
    ),
    "reversed interval": (
        'relation = ">="\nthreshold = 5\n',
        'relation = "in"\nthreshold = [2, 1]\n',
        r"field `threshold`: must be a number, or \[low, high\].*got \[2, 1\]",
    ),
    "number for a pair": (
        'relation = ">="',
        'relation = "in"',
        r"field `threshold`: must be \[low, high\]",
    ),
    "not a number": (
        "threshold = 5\n",
        "threshold = nan\n",
        "field `threshold`: must be a number.*got nan",
    ),
    "missing scale": (
        "[row.scales.paper]\nseeds = 5\nn = 2000\n",
        "",
        "field `scales.paper`: is missing",
    ),
    "unknown scale": ("[row.scales.paper]", "[row.scales.papr]", "no field `papr`"),
    "no seeds": (
        "[row.scales.smoke]\nseeds = 1\n",
        "[row.scales.smoke]\n",
        "field `scales.smoke.seeds`: is missing",
    ),
    "zero seeds": (
        "[row.scales.smoke]\nseeds = 1\n",
        "[row.scales.smoke]\nseeds = 0\n",
        "field `scales.smoke.seeds`: must be a whole number of at least 1",
    ),
    "repeated number": ("number = 21", "number = 7", "field `number`: 7 is taken"),
    "repeated id": ("built-row", "planned-row", "`id`: 'planned-row' is taken by row"),
    "no source": ('arxiv = "2401.12253"\n', "", "needs an `arxiv` id or a `venue`"),
    "not toml": ("number = 21", "number = ", r"transport/rows.toml is not valid TOML"),
    "other tables": ("[[row]]\nnumber = 21", "[[rows]]\nnumber = 21", "got rows"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_gives_one_sentence(tmp_path, fault):
    old, new, sentence = BAD[fault]
    text = PLANNED + BUILT
    assert old in text
    with pytest.raises(CatalogueError, match=sentence) as caught:
        read(tmp_path, text.replace(old, new, 1))
    assert str(caught.value).startswith("transport/rows.toml")
    assert "\n" not in str(caught.value)


def test_a_check_may_not_repeat_a_name(tmp_path):
    again = BUILT[BUILT.index("[[row.checks]]") :]
    with pytest.raises(CatalogueError, match="check 2, field `name`: 'gain' is taken"):
        read(tmp_path, BUILT + again)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "games").mkdir()
    (tmp_path / "games" / "rows.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogueError, match=r"games/rows\.toml cannot be read"):
        load(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CatalogueError, match="There is no row"):
        load(tmp_path)
