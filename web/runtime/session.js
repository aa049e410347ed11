/**
 * The host of a stream program: walks the schedule, owns the states. An engine only runs graphs.
 *
 * Rows normally share their phase. Where resets have put them out of phase, each distinct tick runs once for the whole
 * batch and only the rows it is meant for keep its results.
 */

import { MsCompileError } from "./error.js";
import { Schedule, concrete } from "./spec.js";
import { State } from "./state.js";
import { quoted, tuple } from "./text.js";

/**
 * @typedef {import("./spec.js").Call} Call
 * @typedef {import("./spec.js").GraphSpec} GraphSpec
 * @typedef {import("./spec.js").StreamSpec} StreamSpec
 * @typedef {import("./state.js").Rows} Rows
 * @typedef {import("./state.js").SavedState} SavedState
 * @typedef {import("./engine.js").Engine} Engine
 * @typedef {import("./engine.js").Value} Value
 * @typedef {{ position: number[], states: Map<string, SavedState> }} Snapshot
 */

/** Logits (batch, tokens, vocab) of one step. */
export class Logits {
    /**
     * @param {number} batch
     * @param {number} tokens
     * @param {number} vocab
     */
    constructor(batch, tokens, vocab) {
        this.batch = batch;
        this.tokens = tokens;
        this.vocab = vocab;
        this.data = new Float32Array(batch * tokens * vocab);
    }

    /**
     * The logits (vocab,) after one token of one row; a view.
     * @param {number} row
     * @param {number} token
     */
    at(row, token) {
        const start = (row * this.tokens + token) * this.vocab;
        return this.data.subarray(start, start + this.vocab);
    }
}

/** A group of streams, one a batch row, that keeps its own state. */
export class Session {
    /** @type {Schedule} */ #schedule;
    /** @type {Engine} */ #engine;
    /** @type {Map<string, State>} */ #states;
    /** @type {Map<string, GraphSpec>} */ #graphs;
    /** @type {number[]} */ #position;
    #busy = false;
    #failed = false;

    /**
     * @param {StreamSpec} spec
     * @param {Engine} engine
     * @param {number} batch
     */
    constructor(spec, engine, batch) {
        if (!(Number.isInteger(batch) && 1 <= batch && batch <= spec.max_batch)) {
            const profile = `batch ${batch} is outside this engine's profile of 1 to ${spec.max_batch}`;
            throw new MsCompileError("input", `${profile}; export again with --batch 1:${Math.max(batch, 1)}`);
        }
        this.spec = spec;
        this.batch = batch;
        this.#engine = engine;
        this.#schedule = new Schedule(spec.schedule);
        this.#states = new Map(spec.states.map((state) => [state.name, new State(state, batch)]));
        this.#graphs = new Map(spec.graphs.map((graph) => [graph.name, graph]));
        this.#position = Array(batch).fill(0);
        /** How often each graph has run. */
        this.calls = new Map(spec.graphs.map((graph) => [graph.name, 0]));
    }

    /** Tokens that each row has consumed since its reset. */
    get position() {
        return [...this.#position];
    }

    /**
     * Consume tokens, one list of equal length for each row; logits (batch, T, vocab).
     *
     * A step that is refused has consumed nothing. After one that failed in the engine, `reset()` or `restore()`.
     * @param {ArrayLike<ArrayLike<number>>} tokens
     * @returns {Promise<Logits>}
     */
    async step(tokens) {
        const rows = this.#checked(tokens);
        this.#checkContext(rows[0].length);
        this.#checkFree();
        if (this.#failed) {
            const advice = "an earlier step failed, so the state is unknown: reset() or restore() first";
            throw new MsCompileError("engine", advice);
        }
        this.#busy = this.#failed = true;
        try {
            const logits = await this.#consume(rows);
            this.#failed = false;
            return logits;
        } finally {
            this.#busy = false;
        }
    }

    /**
     * All that the session knows, independent of it.
     * @returns {Snapshot}
     */
    state() {
        this.#checkFree();
        return {
            position: this.position,
            states: new Map([...this.#states].map(([name, kept]) => [name, kept.saved()])),
        };
    }

    /**
     * Go back to a snapshot of a session with the same spec and batch.
     * @param {Snapshot} snapshot
     */
    restore(snapshot) {
        this.#checkFree();
        const names = [...this.#states.keys()];
        if (snapshot.states.size !== names.length || names.some((name) => !snapshot.states.has(name))) {
            throw new MsCompileError("input", "the snapshot is of another model: its states have other names");
        }
        for (const [name, state] of this.#states) {
            const fault = state.fault(/** @type {SavedState} */ (snapshot.states.get(name)));
            if (fault !== null) throw new MsCompileError("input", `the snapshot's ${fault}`);
        }
        for (const [name, state] of this.#states) state.restore(/** @type {SavedState} */ (snapshot.states.get(name)));
        this.#position = [...snapshot.position];
        this.#failed = false;
    }

    /**
     * Begin new streams in these rows, all of them by default.
     * @param {readonly number[] | null} [rows]
     */
    reset(rows = null) {
        this.#checkFree();
        const chosen = rows ?? this.#position.keys();
        if (rows?.some((row) => !(Number.isInteger(row) && 0 <= row && row < this.batch))) {
            throw new MsCompileError(
                "input",
                `rows [${rows.join(", ")}] are outside this session's batch of ${this.batch}`,
            );
        }
        for (const row of chosen) {
            for (const state of this.#states.values()) state.reset(row);
            this.#position[row] = 0;
        }
        if (rows === null) this.#failed = false;
    }

    #checkFree() {
        if (!this.#busy) return;
        const advice = "this session is in use by another step; await it, or give each caller a session of its own";
        throw new MsCompileError("input", advice);
    }

    /**
     * The tokens as lists of numbers.
     * @param {ArrayLike<ArrayLike<number>>} tokens
     */
    #checked(tokens) {
        const rows = Array.from(tokens, (row) => Array.from(row, Number));
        const [count = 0] = rows.map((row) => row.length);
        const wanted = `(batch=${this.batch}, T >= 1)`;
        if (rows.some((row) => row.length !== count)) {
            const came = rows.map((row) => row.length).join(", ");
            throw new MsCompileError("input", `tokens must be a rectangle of shape ${wanted}: its rows have ${came}`);
        }
        if (rows.length !== this.batch || count < 1) {
            throw new MsCompileError("input", `tokens must have shape ${wanted}, not ${tuple([rows.length, count])}`);
        }
        const odd = rows.flat().find((token) => !Number.isInteger(token));
        if (odd !== undefined) throw new MsCompileError("input", `tokens must be whole numbers, not ${odd}`);
        const [low, high] = rows.flat().reduce(([l, h], token) => [Math.min(l, token), Math.max(h, token)], [0, 0]);
        if (low < 0 || high >= this.spec.vocab_size) {
            const known = `this model knows ids 0 to ${this.spec.vocab_size - 1}`;
            throw new MsCompileError("input", `token id ${low < 0 ? low : high} is out of range: ${known}`);
        }
        return rows;
    }

    /** @param {number} count */
    #checkContext(count) {
        const limit = this.spec.max_context ?? Infinity;
        const row = this.#position.findIndex((position) => position + count > limit);
        if (row < 0) return;
        const consumed = `row ${row} has consumed ${this.#position[row]} tokens and ${count} more exceed the context of`;
        const advice = "reset the row, or export again with a larger --context";
        throw new MsCompileError("input", `${consumed} ${limit}; ${advice}`);
    }

    /** @param {number[][]} tokens */
    async #consume(tokens) {
        const count = tokens[0].length;
        const logits = new Logits(this.batch, count, this.spec.vocab_size);
        let done = 0;
        while (done < count) {
            const [phase, ...others] = this.#position.map((position) => this.#schedule.phase(position));
            if (others.every((other) => other === phase)) {
                const call = this.#schedule.nextCall(phase, count - done);
                await this.#run(call, tokens, done, logits, null);
                done += call.tokens;
            } else {
                for (const [call, rows] of this.#byTick()) await this.#run(call, tokens, done, logits, rows);
                done += 1;
            }
        }
        return logits;
    }

    /**
     * One-token calls for rows out of phase, with the rows each is for.
     * @returns {[Call, boolean[]][]}
     */
    #byTick() {
        const calls = this.#position.map((position) => this.#schedule.nextCall(position, 1));
        const keys = calls.map(({ graphs }) => JSON.stringify(graphs));
        const distinct = [...new Set(keys)];
        return distinct.map((key) => [calls[keys.indexOf(key)], keys.map((other) => other === key)]);
    }

    /**
     * @param {Call} call
     * @param {number[][]} tokens
     * @param {number} done
     * @param {Logits} logits
     * @param {Rows} rows
     */
    async #run(call, tokens, done, logits, rows) {
        const taken = tokens.map((row) => row.slice(done, done + call.tokens));
        for (const name of call.graphs) {
            const graph = /** @type {GraphSpec} */ (this.#graphs.get(name));
            const outputs = await this.#engine.run(name, this.#inputs(graph, taken));
            this.calls.set(name, (this.calls.get(name) ?? 0) + 1);
            const found = outputs.get("logits");
            if (found !== undefined) keepLogits(logits, found, call.tokens, done, rows);
            for (const written of graph.writes) {
                const { data, shape } = /** @type {Value} */ (outputs.get(`${written}.out`));
                this.#state(written).keep(data, shape, rows);
            }
        }
        this.#position = this.#position.map(
            (position, row) => position + (rows === null || rows[row] ? call.tokens : 0),
        );
    }

    /**
     * @param {GraphSpec} graph
     * @param {number[][]} tokens
     * @returns {Map<string, Value>}
     */
    #inputs(graph, tokens) {
        const context = Math.max(...this.#position, this.spec.schedule.chunk_multiple);
        const sizes = { batch: this.batch, chunk: tokens[0].length, context };
        const read = new Map(graph.reads.map((name) => [`${name}.in`, this.#state(name)]));
        return new Map(
            graph.inputs.map(({ name, dtype, shape: dims }) => {
                const shape = concrete(dims, sizes);
                const state = read.get(name);
                if (state !== undefined) return [name, { dtype, ...state.leading(shape) }];
                const numbers = name === "tokens" ? tokens.flat() : name === "position" ? this.#position : null;
                if (numbers === null) {
                    const stranger = `graph ${quoted(graph.name)} takes ${quoted(name)}, which no host knows`;
                    throw new MsCompileError("bundle", `${stranger}; export the bundle again`);
                }
                return [name, { dtype, shape, data: BigInt64Array.from(numbers, BigInt) }];
            }),
        );
    }

    /** @param {string} name */
    #state(name) {
        return /** @type {State} */ (this.#states.get(name));
    }
}

/**
 * @param {Logits} logits
 * @param {Value} found
 * @param {number} count
 * @param {number} done
 * @param {Rows} rows
 */
function keepLogits(logits, found, count, done, rows) {
    const size = count * logits.vocab;
    for (let row = 0; row < logits.batch; row += 1) {
        if (rows !== null && !rows[row]) continue;
        const part = /** @type {Float32Array} */ (found.data).subarray(row * size, (row + 1) * size);
        logits.data.set(part, (row * logits.tokens + done) * logits.vocab);
    }
}
