/**
 * The page: asks the worker for text, and shows what it says.
 *
 * The address may fill in the form: index.html?prompt=And&count=200&temperature=0&seed=1
 */

/** @typedef {import("../runtime/manifest.js").Manifest} Manifest */

const BUNDLE = new URL("../model.msc", import.meta.url);
const FIELDS = ["prompt", "count", "temperature", "seed"];

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });

/**
 * @template {HTMLElement} [Kind=HTMLElement]
 * @param {string} id
 */
const the = (id) => /** @type {Kind} */ (document.getElementById(id));

/** @param {string} id */
const field = (id) => /** @type {HTMLInputElement} */ (the(id));

/** @param {number} bytes */
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

/**
 * @param {string} words
 * @param {boolean} [wrong]
 */
function say(words, wrong = false) {
    the("status").textContent = words;
    the("status").classList.toggle("wrong", wrong);
}

/** @param {boolean} running */
function allow(running) {
    field("generate").disabled = running;
    field("stop").disabled = !running;
}

/** @param {{ manifest: Manifest, bytesPerStream: number, bytes: number, runtime: string, tokens: string[] }} opened */
function showModel({ manifest, bytesPerStream, bytes, runtime, tokens }) {
    const { spec, source } = manifest;
    document.title = the("title").textContent = manifest.title;
    const size = source.parameters ? `${(source.parameters / 1e6).toFixed(1)} million parameters, ` : "";
    the("about").textContent =
        `${size}${manifest.precision}. It runs in this browser; nothing that you type leaves it.`;
    the("state").textContent = megabytes(bytesPerStream);
    the("weights").textContent = megabytes(bytes);
    const context = spec.max_context ?? Infinity;
    if (Number.isFinite(context)) field("count").max = String(context);
    if (!field("prompt").value) field("prompt").value = tokens.find((token) => /\w/.test(token)) ?? tokens[0];
    showFacts({
        Bundle: manifest.name,
        "Parity checked": manifest.verified ? "yes" : "no",
        States: String(spec.states.length),
        Context: Number.isFinite(context) ? `${context} tokens` : "endless",
        Runtime: `ONNX Runtime Web ${runtime}, one thread`,
    });
    showGraphs(manifest);
}

/** @param {Record<string, string>} facts */
function showFacts(facts) {
    the("facts").replaceChildren(
        ...Object.entries(facts).map(([name, value]) => {
            const entry = document.createElement("div");
            entry.append(element("dt", name), element("dd", value));
            return entry;
        }),
    );
}

/** @param {Manifest} manifest */
function showGraphs({ spec: { graphs, schedule } }) {
    const period = schedule.ticks.reduce((sum, tick) => sum + tick.repeat, 0);
    const due = (/** @type {string} */ name) => {
        if (name === schedule.prefill) return `a prompt, up to ${schedule.max_chunk} tokens a call`;
        const ticks = schedule.ticks.filter((tick) => tick.graphs.includes(name) || tick.closing.includes(name));
        const phases = ticks.reduce((sum, tick) => sum + tick.repeat, 0);
        return phases === period ? "every token" : `${phases} of ${period} tokens`;
    };
    the("graphs").replaceChildren(
        ...graphs.map(({ name, tokens }) => {
            const consumes = tokens === "chunk" ? "many tokens" : tokens === 1 ? "1 token" : "states only";
            const row = document.createElement("tr");
            const calls = element("td", "0");
            calls.dataset.graph = name;
            row.append(element("td", name), element("td", consumes), element("td", due(name)), calls);
            return row;
        }),
    );
}

/**
 * @param {string} tag
 * @param {string} words
 */
function element(tag, words) {
    return Object.assign(document.createElement(tag), { textContent: words });
}

/**
 * @typedef {object} Facts
 * @property {number} tokens
 * @property {number} prompt  tokens of the prompt
 * @property {number | null} prompt_ms
 * @property {number | null} decode_ms
 * @property {Record<string, number>} calls
 * @property {number} [memory]  bytes
 */

/** @param {Facts} facts */
function showFigures({ tokens, prompt, prompt_ms, decode_ms, calls, memory }) {
    if (decode_ms && tokens > 1) the("rate").textContent = `${((tokens - 1) / (decode_ms / 1e3)).toFixed(0)} tokens/s`;
    if (prompt_ms !== null) {
        the("prefill-of").textContent = `Prompt of ${prompt} tokens`;
        the("prefill").textContent = `${prompt_ms.toFixed(0)} ms`;
    }
    for (const cell of document.querySelectorAll("[data-graph]")) {
        cell.textContent = String(calls[/** @type {HTMLElement} */ (cell).dataset.graph ?? ""]);
    }
    if (memory) the("memory").textContent = megabytes(memory);
}

/** Figures that change faster than they can be read are drawn once a frame. */
const pending = { text: "", /** @type {any} */ facts: null };

function draw() {
    const box = the("text");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40; // CSS pixels
    the("made").append(pending.text);
    pending.text = "";
    if (pending.facts) showFigures(pending.facts);
    pending.facts = null;
    if (atEnd) box.scrollTop = box.scrollHeight;
}

/** @type {Record<string, (message: any) => void>} */
const HEARD = {
    progress({ bytes }) {
        the("progress").hidden = the("loaded").hidden = false;
        the("loaded").textContent = `${megabytes(bytes)} loaded`;
    },
    opened(message) {
        the("progress").hidden = the("loaded").hidden = true;
        showModel(message);
        allow(false);
        say("Ready");
    },
    token(message) {
        if (!pending.facts) requestAnimationFrame(draw);
        pending.text += message.text;
        pending.facts = message;
    },
    done(message) {
        pending.facts = message;
        draw();
        allow(false);
        say(`${message.stopped ? "Stopped" : "Done"}, ${message.tokens} tokens`);
    },
    refused({ message, expected }) {
        the("progress").hidden = the("loaded").hidden = true;
        draw();
        field("stop").disabled = true;
        field("generate").disabled = !the("graphs").childElementCount;
        say(expected ? message : `This should not have happened: ${message}`, true);
    },
};

worker.onmessage = ({ data }) => HEARD[data.verb](data);
worker.onerror = (event) => say(event.message || "This browser cannot run the page: it has no module workers.", true);

the("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const { value: seed } = field("seed");
    the("given").textContent = field("prompt").value;
    the("made").textContent = "";
    allow(true);
    say("Generating");
    worker.postMessage({
        verb: "generate",
        prompt: field("prompt").value,
        count: field("count").valueAsNumber,
        temperature: field("temperature").valueAsNumber,
        seed: seed === "" ? null : Number(seed),
    });
});
the("stop").addEventListener("click", () => worker.postMessage({ verb: "stop" }));
field("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey))
        /** @type {HTMLFormElement} */ (the("form")).requestSubmit();
});

const asked = new URLSearchParams(location.search);
for (const name of FIELDS) if (asked.has(name)) field(name).value = asked.get(name) ?? "";
worker.postMessage({ verb: "open", bundle: BUNDLE.href });
