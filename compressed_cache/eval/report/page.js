// A click on a title sorts by its column, a second one the other way round; what has no value stays
// last. Titles are buttons, so that Enter and Space do the same.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    const words = new Intl.Collator("en", { numeric: true });
    const compare = title.classList.contains("number")
      ? (a, b) => Number(a) - Number(b)
      : words.compare;
    title.firstElementChild.addEventListener("click", () => {
      const ascending = title.getAttribute("aria-sort") !== "ascending";
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.key;
      const rows = [...body.rows].sort((a, b) => {
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        return ascending ? compare(key(a), key(b)) : compare(key(b), key(a));
      });
      body.append(...rows);
      titles.forEach((other) => other.setAttribute("aria-sort", "none"));
      title.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    });
  });
}

// That a table goes on beyond the screen is said where it does.
for (const table of document.querySelectorAll(".scroll")) {
  new ResizeObserver(() => {
    table.previousElementSibling.hidden = table.scrollWidth <= table.clientWidth;
  }).observe(table);
}
