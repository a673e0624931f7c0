"use strict";
// Headings become buttons: without scripts the tables are plain ones.
for (const table of document.querySelectorAll("table:has(thead)")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  const headings = table.tHead.rows[0].cells;
  const original = Array.from(body.rows);
  Array.from(headings).forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const first = heading.classList.contains("number") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const direction = heading.getAttribute("aria-sort") === first ? other : first;
      for (const cell of headings) cell.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", direction);
      body.append(...sorted(original, column, direction === "ascending" ? 1 : -1));
    });
  });
}

// Rows in order; those without a number stay last in either direction, and equals keep the order of the report.
function sorted(rows, column, sign) {
  const numeric = rows.some((row) => row.cells[column].dataset.value !== undefined);
  const key = (row) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent;
    const value = cell.dataset.value;
    return value === undefined ? null : value === "inf" ? Infinity : value === "-inf" ? -Infinity : Number(value);
  };
  return rows.map((row, place) => [key(row), place, row]).sort((a, b) => {
    if (a[0] === null || b[0] === null) return (a[0] === null) - (b[0] === null) || a[1] - b[1];
    const order = numeric ? (a[0] > b[0]) - (a[0] < b[0]) : a[0].localeCompare(b[0], undefined, { numeric: true });
    return sign * order || a[1] - b[1];
  }).map((entry) => entry[2]);
}

// What is folded away on the screen is printed.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open], .cells)")) {
    details.open = true;
    details.dataset.closed = "";
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-closed]")) {
    details.open = false;
    delete details.dataset.closed;
  }
});
