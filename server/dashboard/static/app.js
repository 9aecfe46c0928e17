// Shared by all pages: the colour scheme, live parts, filters, and confirmation of actions.

const POLL_MS = 2000;

function setUpTheme() {
  const select = document.getElementById("theme");
  select.value = document.documentElement.dataset.theme ?? "";
  select.addEventListener("change", () => {
    if (select.value) document.documentElement.dataset.theme = select.value;
    else delete document.documentElement.dataset.theme;
    localStorage.setItem("theme", select.value);
    document.dispatchEvent(new CustomEvent("theme"));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    document.dispatchEvent(new CustomEvent("theme")));
}

// Replace a part's content, but keep the reader's state: open details, checked boxes, scrolling and focus.
function replacePart(part, html) {
  if (part.dataset.html === html) return;
  part.dataset.html = html;
  const open = [...part.querySelectorAll("details[open]")].map((element) => element.id);
  const checked = [...part.querySelectorAll("input:checked")].map((element) => element.id);
  const scrolled = [...part.querySelectorAll(".wide")].map((element) => element.scrollLeft);
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  part.innerHTML = html;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  for (const id of checked) { const box = document.getElementById(id); if (box) box.checked = true; }
  [...part.querySelectorAll(".wide")].forEach((element, i) => { element.scrollLeft = scrolled[i] ?? 0; });
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

async function poll(address, tag) {
  // Polling does not keep an operator's session alive; a viewer's page may be on a wall display.
  const headers = document.body.dataset.role === "operator" ? { "X-Poll": "1" } : {};
  if (tag) headers["If-None-Match"] = tag;
  const response = await fetch(address, { headers, credentials: "same-origin" });
  if (response.status === 304) return tag;
  if (response.status === 401) { location.reload(); return tag; }
  if (!response.ok) throw new Error(`status ${response.status}`);
  const content = await response.json();
  for (const [name, html] of Object.entries(content.parts)) {
    const part = document.querySelector(`[data-part="${name}"]`) ?? document.getElementById("live");
    replacePart(part, html);
  }
  if (content.charts) document.dispatchEvent(new CustomEvent("charts", { detail: content.charts }));
  document.dispatchEvent(new CustomEvent("update"));
  return response.headers.get("ETag");
}

function setUpLive() {
  const live = document.getElementById("live");
  if (!live?.dataset.live) return;
  const offline = document.getElementById("offline");
  let tag = "";
  const pollAgain = async () => {
    if (!document.hidden) {
      try { tag = await poll(live.dataset.live, tag); offline.hidden = true; }
      catch { offline.hidden = false; }
    }
    setTimeout(pollAgain, POLL_MS);
  };
  setTimeout(pollAgain, POLL_MS);
}

function setUpFilter() {
  const form = document.getElementById("filter");
  if (!form) return;
  const apply = () => {
    const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...document.querySelectorAll("tr[data-words]")];
    for (const row of rows) row.hidden = !words.every((word) => row.dataset.words.toLowerCase().includes(word));
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("shown").textContent = words.length ? `${shown} of ${rows.length} shown` : "";
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("update", apply);
}

function setUpCompare() {
  const button = document.getElementById("compare");
  if (!button) return;
  const update = () => {
    button.disabled = document.querySelectorAll("#runs input:checked").length !== 2;
  };
  document.addEventListener("change", update);
  document.addEventListener("update", update);
  update();
}

function setUpConfirmation() {
  document.addEventListener("submit", (event) => {
    const question = event.submitter?.dataset.confirm ?? event.target.dataset.confirm;
    if (question && !confirm(question)) event.preventDefault();
  });
}

setUpTheme();
setUpLive();
setUpFilter();
setUpCompare();
setUpConfirmation();
