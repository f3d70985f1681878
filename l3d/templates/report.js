// Sorting by header and filtering by text for the table of subnetworks; the page is complete without it.
(() => {
  const table = document.getElementById("subnetworks");
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const isText = headers.map((header) => header.classList.contains("text"));
  const rows = [...body.rows].map((row) => {
    const cells = [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent.trim());
    const words = `${row.classList.contains("dead") ? "dead" : "alive"} ${cells.filter((_, i) => isText[i]).join(" ")}`;
    return { row, index: cells[0], words: words.toLowerCase(), values: cells.map((cell, i) => (isText[i] ? cell : Number(cell))) };
  });
  const show = (ordered) => {
    const fragment = document.createDocumentFragment();
    for (const { row } of ordered) fragment.append(row);
    body.append(fragment);
  };

  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      const order = before ? (before === "ascending" ? "descending" : "ascending") : (button.dataset.first ?? "ascending");
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      rows.sort(({ values: a, index: i }, { values: b, index: j }) => {
        const difference = isText[column] ? a[column].localeCompare(b[column]) : a[column] - b[column];
        return sign * difference || i - j;
      });
      show(rows);
    });
  });

  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const apply = () => {
    const terms = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { row, index, words } of rows) {
      const hit = terms.every((term) => (/^\d+$/.test(term) ? index.startsWith(term) : words.includes(term)));
      row.hidden = !hit;
      count += hit;
    }
    shown.textContent = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };
  filter.addEventListener("input", apply);
  document.querySelectorAll(".controls").forEach((control) => (control.hidden = false));
  apply();
})();
