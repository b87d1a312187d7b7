"use strict";
// What makes the page pleasant; without it every number, table and link is there all the same.
{
  const byId = (id) => document.getElementById(id);
  const make = (name, text = "") => Object.assign(document.createElement(name), { textContent: text });
  const address = new URLSearchParams(location.search);
  const remember = (what, value) => {
    if (value) address.set(what, value); else address.delete(what);
    const url = new URL(location);
    url.search = address;
    try { history.replaceState(null, "", url); } catch { /* a page within another has no address of its own */ }
  };

  // ------------------------------------------------------------------ tables: sort=column, or -column from the largest
  const number = (text) => parseFloat(/^[(~≥]?([-+]?[\d,]*\.?\d+(e[-+]?\d+)?)/i.exec(text)?.[1].replaceAll(",", ""));
  const nameOf = (head) => head.textContent.trim().replace(/\s+/g, " ");
  const textAt = (row, column) => row.cells[column].textContent.trim();
  const sort = (table, column, down) => {
    for (const body of table.tBodies) {
      const rows = [...body.rows].map((row) => ({ row, text: textAt(row, column), value: number(textAt(row, column)) }));
      const numeric = rows.filter((r) => !isNaN(r.value)).length * 2 > rows.filter((r) => r.text).length;
      const empty = (r) => numeric ? isNaN(r.value) : !r.text;
      const compare = (a, b) => numeric ? a.value - b.value : a.text.localeCompare(b.text, "en", { numeric: true });
      rows.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : (down ? -1 : 1) * compare(a, b)));
      body.append(...rows.map((r) => r.row));
    }
  };
  const asWritten = (table) => {
    for (const body of table.tBodies) body.append(...[...body.rows].sort((a, b) => a.dataset.at - b.dataset.at));
  };
  const order = (table, name) => {
    const heads = [...table.tHead.rows[0].cells], plain = name.replace(/^-/, "");
    // A header may itself begin with a dash, as `- mae` does.
    const exact = heads.findIndex((head) => nameOf(head) === name);
    const column = exact >= 0 ? exact : heads.findIndex((head) => nameOf(head) === plain);
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    asWritten(table);
    if (column < 0) return;
    sort(table, column, exact < 0);
    heads[column].setAttribute("aria-sort", exact < 0 ? "descending" : "ascending");
  };
  const filter = (table, words, output) => {
    const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(words.toLowerCase());
    output.textContent = words ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
  };
  for (const table of document.querySelectorAll("main table")) {
    const sorting = `sort.${table.id}`, filtering = `filter.${table.id}`;
    const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
    rows.forEach((row, i) => { row.dataset.at = i; });
    for (const head of table.tHead.rows[0].cells) {
      const name = nameOf(head);
      if (!name) continue;
      const button = make("button");
      button.append(...head.childNodes);
      button.title = "sort by this column";
      head.append(button);
      // From the largest, from the smallest, as written.
      button.addEventListener("click", () => {
        const next = { none: `-${name}`, descending: name, ascending: "" }[head.getAttribute("aria-sort") ?? "none"];
        order(table, next);
        remember(sorting, next);
      });
    }
    if (address.has(sorting)) order(table, address.get(sorting));
    if (rows.length < 6) continue;
    const label = make("label"), field = make("input"), output = make("output");
    Object.assign(field, { type: "search", placeholder: "filter rows", value: address.get(filtering) ?? "" });
    field.setAttribute("aria-label", "filter rows");
    label.className = "filter";
    label.append(field, output);
    table.parentElement.before(label);
    field.addEventListener("input", () => { filter(table, field.value, output); remember(filtering, field.value); });
    if (field.value) filter(table, field.value, output);
  }

  // ------------------------------------------------------------------------------------------------------- provenance
  const dialog = document.querySelector("dialog"), box = dialog.querySelector("div");
  const show = (ids) => {
    box.replaceChildren();
    for (const entry of ids.map(byId)) {
      const run = entry.closest(".run");
      box.append(make("h3", entry.querySelector("summary").textContent));
      box.append(entry.querySelector("dl").cloneNode(true), run.querySelector("dl").cloneNode(true));
    }
    for (const link of box.querySelectorAll("dd a")) link.replaceWith(byId(link.hash.slice(1)).textContent);
    dialog.showModal();
    box.parentElement.scrollTop = 0;
  };
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  for (const link of document.querySelectorAll("td a[href^='#']")) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      show([link.hash.slice(1), ...(link.dataset.also?.split(" ") ?? [])]);
    });
  }

  // --------------------------------------------------------------------------------------------- contents, hash, print
  const reveal = () => {
    const target = location.hash && byId(decodeURIComponent(location.hash.slice(1)));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    target?.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  if (location.hash) reveal();
  const contents = document.querySelector("nav details");
  if (contents) {
    const wide = matchMedia("(min-width: 70rem)");
    const fold = () => { contents.open = wide.matches; };
    wide.addEventListener("change", fold);
    fold();
    contents.addEventListener("click", (event) => { if (event.target.tagName === "A" && !wide.matches) fold(); });
    const mark = (entries) => {
      for (const entry of entries.filter((e) => e.isIntersecting)) {
        for (const link of contents.querySelectorAll("a")) {
          if (link.hash === `#${entry.target.id}`) link.setAttribute("aria-current", "true");
          else link.removeAttribute("aria-current");
        }
      }
    };
    const observer = new IntersectionObserver(mark, { rootMargin: "-10% 0px -80% 0px" });
    document.querySelectorAll("main > section").forEach((section) => observer.observe(section));
  }
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("details.print:not([open])")];
    for (const details of unfolded) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of unfolded) details.open = false; });
}
