for (const tools of document.querySelectorAll(".tools")) {
  const body = tools.nextElementSibling.tBodies[0];
  const [filter, order] = tools.querySelectorAll("input, select");
  const compare = {
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name),
    delta: (a, b) => a.dataset.delta - b.dataset.delta,
    p: (a, b) => a.dataset.p - b.dataset.p,
    n: (a, b) => b.dataset.n - a.dataset.n,
  };
  tools.hidden = false;
  order.addEventListener("change", () => body.append(...[...body.rows].sort(compare[order.value])));
  filter.addEventListener("input", () => {
    for (const row of body.rows) row.hidden = !row.dataset.name.includes(filter.value.trim().toLowerCase());
  });
}
