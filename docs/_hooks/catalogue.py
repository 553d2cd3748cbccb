"""Topics and rows on the site, read from the catalogue when the site is built.

A topic with methods has a page written by hand, to which its rows are added; a planned
topic has a page of its rows alone. A row's page gets its links to topic, reference and
verdict. Nothing of what the catalogue knows is written twice.
"""

import html
from pathlib import Path

from mkdocs.structure.files import File, Files

import varan
from varan.lab.catalogue import Row, load

# A topic that is not here is called by its name.
TITLES = {
    "bayesopt": "Bayesian optimisation",
    "bilevel": "Bilevel problems",
    "combinatorial": "Combinatorial optimisation",
    "compression": "Compression and distillation",
    "constrained": "Constrained optimisation",
    "control": "Control and reinforcement learning",
    "diffusion": "Diffusion models",
    "dynamics": "Dynamical systems",
    "explain": "Explanation",
    "federated": "Federated learning",
    "firstorder": "First-order methods",
    "games": "Games and online learning",
    "geometry": "Geometry and 3D vision",
    "graphs": "Graphs and topology",
    "inference": "Inference",
    "landscape": "Loss landscapes",
    "latent": "Latent-variable models",
    "lipschitz": "Lipschitz constants of networks",
    "matrix": "Matrix and manifold problems",
    "media": "Images, sound and motion",
    "privacy": "Privacy",
    "search": "Program search and discovery",
    "secondorder": "Second-order methods",
    "sharpness": "Sharpness",
    "shift": "Distribution shift and generalisation",
    "transport": "Optimal transport",
    "zeroth": "Zeroth-order methods",
}
CATALOGUE = load()
_DOCS = Path(__file__).parents[1]


def title(topic: str) -> str:
    """A topic in words."""
    return TITLES.get(topic, topic.capitalize())


def on_config(config):
    with_methods = [topic for topic in CATALOGUE.topics if built(topic)]
    planned = [topic for topic in CATALOGUE.topics if not built(topic)]
    filled = {
        "Topics": [
            "topics/index.md",
            *(_entry(topic) for topic in with_methods),
            {"Operators": "topics/operators.md"},
            {"Planned": [_entry(topic) for topic in planned]},
        ],
        "Rows": ["rows/index.md", *(_page(row) for row in rows(state="built"))],
    }
    for entry in config.nav:
        for title in entry.keys() & filled.keys():
            entry[title] = filled[title]
    return config


def on_files(files: Files, config):
    for topic in CATALOGUE.topics:
        page = f"topics/{topic}.md"
        if files.get_file_from_path(page) is None:
            content = f"# {title(topic)}\n"
            if not built(topic):
                content += "\nNo row of this topic is built yet.\n"
            files.append(File.generated(config, page, content=content))
    for page, content in (("topics/index.md", _topics()), ("rows/index.md", _built())):
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    folder, _, name = page.file.src_uri.removesuffix(".md").rpartition("/")
    if folder == "topics" and name in CATALOGUE.topics:
        return markdown + _rows_of(name)
    if folder == "rows" and name != "index":
        title, _, rest = markdown.partition("\n")
        facts = _facts(CATALOGUE.find(name), config.extra.get("report_url"))
        return f"{title}\n\n{facts}\n{rest}"
    return markdown


def rows(topic: str | None = None, state: str | None = None) -> tuple[Row, ...]:
    """Rows of the catalogue."""
    return CATALOGUE.select(topic, state)


def built(topic: str) -> tuple[Row, ...]:
    """The rows of a topic that can run."""
    return rows(topic, "built")


def _entry(topic: str) -> dict[str, str]:
    return {title(topic): f"topics/{topic}.md"}


def _page(row: Row) -> str:
    return f"rows/{row.id}.md"


def _facts(row: Row, report_url: str | None) -> str:
    """The line under a row's title: where to go from here."""
    methods = ", ".join(_in_reference(method) for method in row.method)
    entries = [
        f"Topic: [{title(row.topic)}](../topics/{row.topic}.md)",
        f"Methods: {methods}",
    ]
    if _measured(row):
        entries.append(f"Numbers and verdict: [measured]({_measured(row)})")
    if report_url:
        entries.append(f"[In the report]({report_url.rstrip('/')}/rows/{row.id}.html)")
    return "<div class=varan-facts markdown>\n" + "  \n".join(entries) + "\n</div>\n"


def _measured(row: Row) -> str:
    """Where on its page a row's numbers stand, if they have their heading."""
    text = (_DOCS / _page(row)).read_text(encoding="utf-8")
    return "#measured" if "\n## Measured\n" in text else ""


def _in_reference(method: str) -> str:
    module, _, name = method.partition(":")
    if module == "varan.core" and name in varan.__all__:
        module = "varan"  # where the reference has it
    return f"[`{name}`][{module}.{name}]"


def _rows_of(topic: str) -> str:
    """The rows of a topic, built ones with their claims."""
    text = ""
    if built(topic):
        text += "\n\n## Rows that run\n\n" + _claims(built(topic), "../rows/")
    planned = rows(topic, "planned")
    if planned:
        text += "\n\n## Planned rows\n\n| row | paper | where |\n| --- | --- | --- |\n"
        text += "".join(
            f"| {row.number:03d} | {_escape(row.title)} | {_published(row)} |\n"
            for row in planned
        )
    return text


def _claims(selected: tuple[Row, ...], folder: str) -> str:
    return "\n".join(
        f"[**{row.number:03d} · {row.title}**]({folder}{row.id}.md)  \n"
        f"{row.claim}  \n"
        f"`varan run {row.id}` · [measured, with the verdict]"
        f"({folder}{row.id}.md{_measured(row)}) · {_published(row)}\n"
        for row in selected
    )


def _published(row: Row) -> str:
    venue = row.venue or (str(row.year) if row.year else "")
    if not row.arxiv:
        return venue
    link = f"[arXiv {row.arxiv}](https://arxiv.org/abs/{row.arxiv})"
    return f"{venue}, {link}" if venue else link


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")


def _topics() -> str:
    lines = "".join(
        f"| [{title(topic)}]({topic}.md) | `{topic}` | {len(built(topic)) or ''} "
        f"| {len(rows(topic, 'planned'))} |\n"
        for topic in sorted(CATALOGUE.topics, key=lambda topic: not built(topic))
    )
    return (
        f"# Topics\n\n{len(rows())} papers stand in the catalogue, in "
        f"{len(CATALOGUE.topics)} topics. {len(rows(state='built'))} are built: their "
        "methods are public, and `varan run` measures their claims. The others are "
        "planned and say so. The [operators](operators.md) that methods are made of "
        "have a page of their own.\n\n"
        "| topic | name in `--topic` | built | planned |\n"
        f"| --- | --- | ---: | ---: |\n{lines}"
    )


def _built() -> str:
    return (
        "# Built rows\n\nA row is a paper, its method and its claim, made executable. "
        "[The lab](../guide/lab.md) says what runs and verdicts are; planned rows "
        "stand with their [topics](../topics/index.md).\n\n"
        + _claims(rows(state="built"), "")
    )
