// Shows /api/status once a second. Text from the server only ever becomes text nodes, never markup.
"use strict";

const PERIOD_MS = 1000;
const $ = (id) => document.getElementById(id);
const GOOD = new Set(["ready", "running"]);
const BAD = new Set(["failed", "backing_off"]);
let lastSeen = 0;

function keyFromLink() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (key) {
    sessionStorage.setItem("key", key);
    history.replaceState(null, "", location.pathname);
  }
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function bytes(size) {
  if (size === null || size === undefined) return "–";
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (size >= unit) return `${(size / unit).toFixed(1)} ${name}`;
  return `${size} B`;
}

function since(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

// Only what changed is written, so that a person can mark and copy it.
const setText = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };

const state = (word) =>
  element("span", { className: `badge ${GOOD.has(word) ? "good" : BAD.has(word) ? "bad" : "warn"}` }, word.replace("_", " "));
const simulated = (is) => (is ? element("span", { className: "badge warn" }, "simulated") : null);

function table(id, heads, rows, empty) {
  if (!rows.length) return $(id).replaceChildren(element("tbody", {}, element("tr", {}, element("td", { className: "quiet" }, empty))));
  const head = element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text))));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, ...[cell].flat()))));
  $(id).replaceChildren(head, element("tbody", {}, ...body));
}

function device(one) {
  const used = one.memory_bytes_used ?? 0;
  const facts = [
    one.utilisation === null ? null : `${Math.round(one.utilisation * 100)} % busy`,
    one.temperature_c === null ? null : `${Math.round(one.temperature_c)} °C`,
    one.power_w === null ? null : `${Math.round(one.power_w)} W`,
    one.reading_age_s === null ? "not read yet" : one.reading_age_s > 5 ? `${since(one.reading_age_s)} ago` : null,
  ].filter(Boolean);
  return element("div", { className: "device" },
    element("div", { className: "row" },
      element("strong", {}, one.name, " ", simulated(one.is_simulated) ?? ""),
      element("span", { className: "quiet" }, facts.join(" · ")),
      element("span", {}, `${bytes(one.memory_bytes_used)} of ${bytes(one.memory_bytes_total)} used, ${bytes(one.memory_bytes_granted)} granted`)),
    element("progress", { max: one.memory_bytes_total, value: used, title: one.id }),
    one.fault ? element("p", { className: "error" }, one.fault) : null);
}

function show(status) {
  lastSeen = Date.now();
  const ready = status.models.filter((model) => model.state === "ready").length;
  $("summary").textContent = status.ready
    ? `Ready: ${ready} of ${status.models.length} models served.`
    : status.models.length ? `Waiting for ${status.models.filter((m) => m.state !== "ready").map((m) => m.name).join(", ")}.`
    : "No model yet: fleetmind models add FILE";
  $("dot").className = `dot ${status.ready ? "good" : "warn"}`;
  $("simulated").hidden = !status.is_simulated;
  $("version").textContent = `Version ${status.version} · ${status.url} · up ${since(status.uptime_s)}`;
  const tile = (number, text) => element("div", { className: "tile" }, element("b", {}, String(number)), element("span", {}, text));
  $("tiles").replaceChildren(
    tile(status.calls.outstanding, "calls being answered"), tile(status.calls.queued, "calls waiting"),
    tile(`${ready}/${status.models.length}`, "models served"), tile(status.devices.length, status.devices.length === 1 ? "device" : "devices"));
  table("models", ["Name", "State", "Context × slots", "Weights", "Engine", ""], status.models.map((m) => [
    [m.name, " ", simulated(m.is_simulated) ?? ""], state(m.state), m.context_tokens ? `${m.context_tokens} × ${m.slots}` : `– × ${m.slots}`,
    bytes(m.weights_bytes), m.engine, element("span", { className: "quiet" }, m.reason)]), "None yet. Add one: fleetmind models add FILE");
  $("devices").replaceChildren(...status.devices.map(device));
  table("replicas", ["Id", "Model", "State", "Devices", "Calls", ""], status.replicas.map((r) => [
    r.id, r.model, state(r.state), r.devices.join(", ") || "elsewhere", `${r.outstanding} of ${r.slots}`,
    element("span", { className: "quiet" }, r.reason)]), "None is running.");
  table("loops", ["Loop", "State", "Restarts", "Last error"], status.loops.map((l) => [
    l.name, state(l.state), String(l.restarts), element("span", { className: "quiet" }, l.last_error ?? "")]), "None.");
  const model = (status.models.find((m) => m.state === "ready") ?? status.models[0])?.name ?? "MODEL";
  const origin = location.origin;
  setText("curl", `curl ${origin}/v1/chat/completions -H "Authorization: Bearer $FLEETMIND_KEY" \\\n  -d '{"model": "${model}", "messages": [{"role": "user", "content": "Hello"}]}'`);
  setText("python", `from openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1", api_key="fm_…")\nreply = client.chat.completions.create(model="${model}", messages=[{"role": "user", "content": "Hello"}])\nprint(reply.choices[0].message.content)`);
}

function lock(refusal) {
  $("unlock").hidden = false;
  $("live").hidden = true;
  $("summary").textContent = "Locked: a key is needed.";
  $("refusal").hidden = !refusal;
  $("refusal").textContent = refusal ?? "";
}

async function look() {
  const key = sessionStorage.getItem("key");
  if (!key) return lock();
  try {
    const response = await fetch("/api/status", { headers: { Authorization: `Bearer ${key}` }, cache: "no-store" });
    const answer = await response.json();
    if (response.status === 401 || response.status === 403) {
      sessionStorage.removeItem("key");
      return lock(answer.error.message);
    }
    if (!response.ok) throw new Error(answer.error.message);
    $("unlock").hidden = true;
    $("live").hidden = false;
    show(answer);
  } catch (error) {
    $("dot").className = "dot bad";
    const age = lastSeen ? ` What is shown is ${since((Date.now() - lastSeen) / 1000)} old.` : "";
    $("summary").textContent = `The server does not answer.${age}`;
  }
}

async function loop() {
  if (!document.hidden) await look();
  setTimeout(loop, PERIOD_MS);
}

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = "";
  look();
});
addEventListener("hashchange", () => { keyFromLink(); look(); });
keyFromLink();
loop();
