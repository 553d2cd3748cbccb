// Search and filters of the catalogue. The address holds them, so that a view can be
// shared; without this script the whole table stands there.
(() => {
  "use strict";
  const form = document.getElementById("filters");
  const status = document.getElementById("shown");
  const nothing = document.getElementById("nothing");
  const topics = document.getElementById("topics");
  const FIELDS = ["q", "topic", "verdict", "page"];

  const plain = (text) =>
    text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().replace(/\s+/g, " ");

  const groups = [...document.querySelectorAll("#catalogue tbody")].map((body) => ({
    body,
    rows: [...body.querySelectorAll("tr[data-topic]")].map((row) => ({
      row,
      topic: row.dataset.topic,
      verdict: row.dataset.verdict,
      state: row.dataset.state,
      pages: row.dataset.pages.split(" "),
      text: plain(`${row.cells[0].textContent} ${row.cells[1].textContent} ${row.dataset.words}`),
    })),
  }));
  const rows = groups.flatMap((group) => group.rows);

  const TESTS = {
    q: (row, value) => plain(value).split(" ").every((word) => row.text.includes(word)),
    topic: (row, value) => row.topic === value,
    verdict: (row, value) => (value === "built" ? row.state === "built" : row.verdict === value),
    page: (row, value) => row.pages.includes(value),
  };

  const chosen = () =>
    Object.fromEntries(FIELDS.map((name) => [name, form.elements[name].value.trim()]));
  // Whether a row passes all filters but one.
  const passes = (row, wanted, besides) =>
    FIELDS.every((name) => name === besides || !wanted[name] || TESTS[name](row, wanted[name]));

  // Each choice says how many rows it would leave, given the other filters.
  const count = (wanted) => {
    for (const name of FIELDS.slice(1)) {
      const others = rows.filter((row) => passes(row, wanted, name));
      for (const option of form.elements[name].options) {
        const left = option.value
          ? others.filter((row) => TESTS[name](row, option.value)).length
          : others.length;
        option.dataset.name ??= option.textContent.trim();
        option.textContent = `${option.dataset.name} (${left})`;
      }
    }
  };

  const show = () => {
    const wanted = chosen();
    const filtered = FIELDS.some((name) => wanted[name]);
    let total = 0;
    for (const group of groups) {
      let left = 0;
      for (const entry of group.rows) {
        const fits = passes(entry, wanted);
        entry.row.hidden = !fits;
        left += fits;
      }
      group.body.hidden = left === 0;
      total += left;
    }
    count(wanted);
    nothing.hidden = total > 0;
    topics.hidden = filtered;
    status.textContent = filtered
      ? `${total} of ${rows.length} rows`
      : `All ${rows.length} rows`;
  };

  const address = () => {
    const wanted = chosen();
    const told = new URLSearchParams(FIELDS.filter((n) => wanted[n]).map((n) => [n, wanted[n]]));
    const hash = told.toString();
    const bare = location.href.split("#")[0];
    history.replaceState(null, "", hash ? `${bare}#${hash}` : bare);
  };

  const read = () => {
    const hash = location.hash.slice(1);
    // Without "=" it is an anchor: the table stays whole, and the browser goes there.
    const told = new URLSearchParams(hash.includes("=") ? hash : "");
    for (const name of FIELDS) {
      const field = form.elements[name];
      field.value = told.get(name) || "";
      // A choice that does not exist means none.
      if (field.selectedIndex === -1) field.value = "";
    }
    show();
  };

  const changed = () => { show(); address(); };
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(changed));
  addEventListener("hashchange", read);
  // The numbers above choose rows here; without this script they lead to the scoreboard.
  for (const link of document.querySelectorAll(".tiles a")) {
    link.href = `#${new URLSearchParams({ verdict: link.dataset.verdict })}`;
  }
  form.hidden = false;
  read();
})();
