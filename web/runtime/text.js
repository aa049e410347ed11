/** Values as Python shows them, so that every host says the same sentence. */

const LONGEST_TEXT = 30; // the limits of Python's reprlib
const MOST_ITEMS = 6;
const MOST_ENTRIES = 4;
const DEEPEST = 6;
const ESCAPES = new Map([
    ["\n", "\\n"],
    ["\r", "\\r"],
    ["\t", "\\t"],
    ["\\", "\\\\"],
]);

/**
 * A text in Python's quotes.
 * @param {string} text
 */
export function quoted(text) {
    const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
    const escaped = Array.from(text, (letter) => {
        if (ESCAPES.has(letter)) return ESCAPES.get(letter);
        if (letter === quote) return `\\${letter}`;
        if (letter < " " || letter === "\x7f") return `\\x${letter.charCodeAt(0).toString(16).padStart(2, "0")}`;
        return letter;
    });
    return quote + escaped.join("") + quote;
}

/**
 * A shape as a tuple.
 * @param {readonly (number | string)[]} dims
 */
export function tuple(dims) {
    const items = dims.map((dim) => (typeof dim === "string" ? quoted(dim) : String(dim)));
    return `(${items.join(", ")}${items.length === 1 ? "," : ""})`;
}

/**
 * The name of a JSON value's type.
 * @param {unknown} value
 */
export function typeName(value) {
    if (value === null) return "NoneType";
    if (Array.isArray(value)) return "list";
    if (typeof value === "boolean") return "bool";
    if (typeof value === "number") return Number.isInteger(value) ? "int" : "float";
    return typeof value === "string" ? "str" : "dict";
}

/**
 * A JSON value, long ones shortened.
 * @param {unknown} value
 * @param {number} [levels]
 * @returns {string}
 */
export function shown(value, levels = DEEPEST) {
    if (value === null) return "None";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (typeof value === "string") return shortened(quoted(value));
    if (typeof value !== "object") return String(value);
    const [open, close] = Array.isArray(value) ? "[]" : "{}";
    const items = Array.isArray(value)
        ? value.slice(0, MOST_ITEMS).map((item) => shown(item, levels - 1))
        : Object.entries(value)
              .slice(0, MOST_ENTRIES)
              .map(([key, item]) => `${shown(key)}: ${shown(item, levels - 1)}`);
    if (items.length && levels <= 0) return `${open}...${close}`;
    if (Object.keys(value).length > items.length) items.push("...");
    return open + items.join(", ") + close;
}

/** @param {string} text */
function shortened(text) {
    const letters = Array.from(text);
    if (letters.length <= LONGEST_TEXT) return text;
    const head = Math.floor((LONGEST_TEXT - 3) / 2);
    const tail = LONGEST_TEXT - 3 - head;
    return `${letters.slice(0, head).join("")}...${letters.slice(-tail).join("")}`;
}
