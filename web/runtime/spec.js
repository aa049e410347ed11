/**
 * What a manifest says of a stream, and what follows from it: sizes, and which graphs run for which token.
 *
 * @typedef {number | string} Dim  a size, or "batch", "chunk", "chunk/k", "context", "context/k"
 * @typedef {{ name: string, dtype: string, shape: Dim[] }} TensorSpec
 * @typedef {object} StateSpec
 * @property {string} name
 * @property {string} dtype
 * @property {Dim[]} shape
 * @property {"replace" | "append"} update
 * @property {number | null} time_axis
 * @property {number} batch_axis
 * @property {number | number[]} initial
 * @property {boolean} reads_initial
 * @typedef {object} GraphSpec
 * @property {string} name
 * @property {TensorSpec[]} inputs
 * @property {TensorSpec[]} outputs
 * @property {string[]} reads
 * @property {string[]} writes
 * @property {Dim} tokens
 * @typedef {{ graphs: string[], closing: string[], repeat: number }} Tick
 * @typedef {{ ticks: Tick[], prefill: string | null, chunk_multiple: number, max_chunk: number }} ScheduleSpec
 * @typedef {{ name: string, dtype: string, shape: number[], every: number, below: number | null }} HostInput
 * @typedef {object} StreamSpec
 * @property {StateSpec[]} states
 * @property {GraphSpec[]} graphs
 * @property {ScheduleSpec} schedule
 * @property {number} vocab_size
 * @property {number} max_batch
 * @property {number | null} max_context
 * @property {HostInput[]} inputs
 * @typedef {{ batch: number, chunk?: number, context?: number }} Sizes
 */

/** Bytes of one element, by dtype. */
export const ITEM_BYTES = new Map([
    ["bool", 1],
    ["int8", 1],
    ["int16", 2],
    ["int32", 4],
    ["int64", 8],
    ["uint8", 1],
    ["float16", 2],
    ["float32", 4],
    ["float64", 8],
]);

/**
 * A shape with its words replaced.
 * @param {readonly Dim[]} shape
 * @param {Sizes} sizes
 */
export function concrete(shape, { batch, chunk = 1, context = 0 }) {
    return shape.map((dim) => {
        if (typeof dim === "number") return dim;
        const [word, divisor = "1"] = dim.split("/");
        const size = word === "batch" ? batch : word === "chunk" ? chunk : context;
        return Math.floor(size / Number(divisor));
    });
}

/**
 * Bytes of state that one stream keeps: what was, and in replaced states what becomes of it.
 * @param {StreamSpec} spec
 */
export function bytesPerStream(spec) {
    const bytes = spec.states.map(({ dtype, shape, update }) => {
        const held = update === "replace" ? 2 : 1;
        return held * product(concrete(shape, { batch: 1 })) * itemBytes(dtype);
    });
    return bytes.reduce((sum, size) => sum + size, 0);
}

/** @param {string} dtype */
export function itemBytes(dtype) {
    return /** @type {number} */ (ITEM_BYTES.get(dtype));
}

/** @param {readonly number[]} sizes */
export function product(sizes) {
    return sizes.reduce((result, size) => result * size, 1);
}

/**
 * The next thing a host does: these graphs, in order, on this many tokens.
 * @typedef {{ graphs: string[], tokens: number }} Call
 */

/** Which graphs run for token number n: the tick at phase `n % period`. */
export class Schedule {
    /** @param {ScheduleSpec} spec */
    constructor(spec) {
        this.spec = spec;
        this.period = spec.ticks.reduce((sum, tick) => sum + tick.repeat, 0);
    }

    /** @param {number} position */
    phase(position) {
        return position % this.period;
    }

    /**
     * What to run next for a row that has consumed `position` tokens and has `remaining` to go.
     * @param {number} position
     * @param {number} remaining
     * @returns {Call}
     */
    nextCall(position, remaining) {
        const length = this.#chunk(position, remaining);
        if (this.spec.prefill !== null && length > 1) {
            return { graphs: [this.spec.prefill, ...this.#tick(position + length - 1).closing], tokens: length };
        }
        const tick = this.#tick(position);
        return { graphs: [...tick.graphs, ...tick.closing], tokens: 1 };
    }

    /** @param {number} position */
    #tick(position) {
        let phase = this.phase(position);
        for (const tick of this.spec.ticks) {
            if (phase < tick.repeat) return tick;
            phase -= tick.repeat;
        }
        throw new RangeError("ticks cover the period");
    }

    /**
     * @param {number} position
     * @param {number} remaining
     */
    #chunk(position, remaining) {
        const { prefill, chunk_multiple, max_chunk } = this.spec;
        if (prefill === null || position % chunk_multiple !== 0) return 0;
        const length = Math.min(remaining, max_chunk, this.#untilClosing(position));
        return length - (length % chunk_multiple);
    }

    /**
     * Tokens up to and including the next one with closing graphs; infinite where none has.
     * @param {number} position
     */
    #untilClosing(position) {
        const phase = this.phase(position);
        let [start, nearest] = [0, Infinity];
        for (const tick of this.spec.ticks) {
            if (tick.closing.length) {
                const first = start + tick.repeat > phase ? Math.max(start, phase) : start + this.period;
                nearest = Math.min(nearest, first - phase + 1);
            }
            start += tick.repeat;
        }
        return nearest;
    }
}
