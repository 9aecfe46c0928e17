// What all pages share: the colour scheme, parts that renew themselves, filters, and questions before actions.

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

// Exchange a part's content, and keep what the reader did to it: what is open, chosen, scrolled and focused.
function exchange(part, html) {
  if (part.dataset.was === html) return;
  part.dataset.was = html;
  const open = [...part.querySelectorAll("details[open]")].map((one) => one.id);
  const checked = [...part.querySelectorAll("input:checked")].map((one) => one.id);
  const scrolled = [...part.querySelectorAll(".wide")].map((one) => one.scrollLeft);
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  part.innerHTML = html;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  for (const id of checked) { const box = document.getElementById(id); if (box) box.checked = true; }
  [...part.querySelectorAll(".wide")].forEach((one, i) => { one.scrollLeft = scrolled[i] ?? 0; });
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

async function poll(address, tag) {
  // An operator who is away is signed out in time; a viewer's page may hang on a wall.
  const headers = document.body.dataset.role === "operator" ? { "X-Poll": "1" } : {};
  if (tag) headers["If-None-Match"] = tag;
  const answer = await fetch(address, { headers, credentials: "same-origin" });
  if (answer.status === 304) return tag;
  if (answer.status === 401) { location.reload(); return tag; }
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const told = await answer.json();
  for (const [name, html] of Object.entries(told.parts)) {
    const part = document.querySelector(`[data-part="${name}"]`) ?? document.getElementById("live");
    exchange(part, html);
  }
  if (told.charts) document.dispatchEvent(new CustomEvent("charts", { detail: told.charts }));
  document.dispatchEvent(new CustomEvent("renewed"));
  return answer.headers.get("ETag");
}

function setUpLive() {
  const live = document.getElementById("live");
  if (!live?.dataset.live) return;
  const offline = document.getElementById("offline");
  let tag = "";
  const again = async () => {
    if (!document.hidden) {
      try { tag = await poll(live.dataset.live, tag); offline.hidden = true; }
      catch { offline.hidden = false; }
    }
    setTimeout(again, POLL_MS);
  };
  setTimeout(again, POLL_MS);
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
  document.addEventListener("renewed", apply);
}

function setUpCompare() {
  const button = document.getElementById("compare");
  if (!button) return;
  const look = () => {
    button.disabled = document.querySelectorAll("#runs input:checked").length !== 2;
  };
  document.addEventListener("change", look);
  document.addEventListener("renewed", look);
  look();
}

function setUpQuestions() {
  document.addEventListener("submit", (event) => {
    const question = event.submitter?.dataset.confirm ?? event.target.dataset.confirm;
    if (question && !confirm(question)) event.preventDefault();
  });
}

setUpTheme();
setUpLive();
setUpFilter();
setUpCompare();
setUpQuestions();
