// A click on a heading sorts its table by that column, a second one the other way round.
function sortBy(head) {
  const table = head.closest("table"), column = head.cellIndex, numeric = head.classList.contains("number");
  const order = head.getAttribute("aria-sort") === (numeric ? "descending" : "ascending") ? -1 : 1;
  const sign = numeric ? -order : order;
  const value = row => {
    const cell = row.cells[column];
    return numeric ? Number(cell.dataset.value ?? -Infinity) : cell.textContent.trim();
  };
  const compare = (a, b) => (numeric ? value(a) - value(b) : value(a).localeCompare(value(b), "en", {numeric: true}));
  const rows = [...table.tBodies[0].rows].sort((a, b) => sign * (compare(a, b) || 0));
  table.tBodies[0].append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
document.getElementById("rejected-only").addEventListener("change", event => {
  document.getElementById("decisions").classList.toggle("only-rejected", event.target.checked);
});
