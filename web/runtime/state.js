/**
 * What a session keeps of a state, and how a step's results get there: a replaced state becomes what a graph returns;
 * an appended one is a ring, into which the new rows are copied.
 */

import { copy, element, zeros } from "./arrays.js";
import { concrete, product } from "./spec.js";
import { tuple } from "./text.js";

/**
 * @typedef {import("./arrays.js").TypedArray} TypedArray
 * @typedef {import("./spec.js").StateSpec} StateSpec
 * @typedef {boolean[] | null} Rows  which batch rows a call is for; null: all of them
 * @typedef {{ shape: number[], data: TypedArray, written: number[] }} SavedState
 */

export class State {
    /**
     * @param {StateSpec} spec
     * @param {number} batch
     */
    constructor(spec, batch) {
        this.spec = spec;
        this.batch = batch;
        this.shape = concrete(spec.shape, { batch });
        this.isRing = spec.update === "append";
        this.data = zeros(spec.dtype, product(this.shape));
        this.written = Array(batch).fill(0); // rows appended since the reset of each stream
        this.#start = this.#initial();
        for (let row = 0; row < batch; row += 1) this.reset(row);
    }

    /** @type {TypedArray} of one stream */
    #start;

    #initial() {
        const { spec } = this;
        const shape = concrete(spec.shape, { batch: 1 });
        const data = zeros(spec.dtype, product(shape));
        if (!Array.isArray(spec.initial))
            return data.fill(/** @type {never} */ (element(spec.dtype, spec.initial, spec.name)));
        const values = spec.initial.map((value) => element(spec.dtype, value, spec.name));
        const after = product(shape.slice(spec.time_axis === null ? 0 : spec.time_axis + 1));
        const rows = spec.time_axis === null ? 1 : shape[spec.time_axis];
        for (let index = 0; index < data.length; index += 1) {
            data[index] = values[Math.floor(index / (rows * after)) * after + (index % after)]; // the same in every row
        }
        return data;
    }

    /**
     * What a graph that takes `shape` reads: the state, or a copy of its leading rows.
     * @param {number[]} shape
     * @returns {{ shape: number[], data: TypedArray }}
     */
    leading(shape) {
        const axis = this.spec.time_axis ?? 0;
        if (shape[axis] >= this.shape[axis]) return this;
        const inner = product(this.shape.slice(axis + 1));
        const [taken, whole] = [shape[axis] * inner, this.shape[axis] * inner];
        const data = zeros(this.spec.dtype, product(shape));
        for (let i = 0; i * taken < data.length; i += 1) copy(data, i * taken, this.data, i * whole, i * whole + taken);
        return { shape, data };
    }

    /**
     * Take what a graph returned.
     * @param {TypedArray} data
     * @param {readonly number[]} shape
     * @param {Rows} rows
     */
    keep(data, shape, rows) {
        for (let row = 0; row < this.batch; row += 1) {
            const wanted = rows === null || rows[row];
            if (this.isRing && wanted) this.#append(data, shape[this.spec.time_axis ?? 0], row);
            if (!this.isRing && !wanted) this.#copyRow(this.data, row, this.batch, data, row);
        }
        if (!this.isRing) this.data = data;
    }

    /**
     * Put new rows behind the last ones of a stream, wrapping around; of more rows than there are slots, the newest.
     * @param {TypedArray} data
     * @param {number} added
     * @param {number} row
     */
    #append(data, added, row) {
        const capacity = this.shape[this.spec.time_axis ?? 0];
        const count = Math.min(added, capacity);
        const skipped = added - count;
        const start = (this.written[row] + skipped) % capacity;
        const head = Math.min(count, capacity - start);
        this.#write(data, added, skipped, start, head, row);
        this.#write(data, added, skipped + head, 0, count - head, row);
        this.written[row] += added;
    }

    /**
     * Copy `count` rows of an output of `length`, beginning with row `from`, to the slots from `slot` on.
     * @param {TypedArray} data
     * @param {number} length
     * @param {number} from
     * @param {number} slot
     * @param {number} count
     * @param {number} row
     */
    #write(data, length, from, slot, count, row) {
        const time = this.spec.time_axis ?? 0;
        const axis = this.spec.batch_axis;
        const [first, second] = [Math.min(axis, time), Math.max(axis, time)];
        const [outer, middle] = [product(this.shape.slice(0, first)), product(this.shape.slice(first + 1, second))];
        const inner = product(this.shape.slice(second + 1));
        const timeFirst = time < axis;
        const capacity = this.shape[time];
        /** @type {(i: number, j: number, at: number, rows: number) => number} */
        const place = (i, j, at, rows) =>
            inner *
            (timeFirst
                ? ((i * rows + at) * middle + j) * this.batch + row
                : ((i * this.batch + row) * middle + j) * rows + at);
        const block = inner * (timeFirst ? 1 : count); // contiguous in both
        for (let i = 0; i < outer; i += 1) {
            for (let at = 0; at < (timeFirst ? count : Math.min(count, 1)); at += 1) {
                for (let j = 0; j < middle; j += 1) {
                    const source = place(i, j, from + at, length);
                    copy(this.data, place(i, j, slot + at, capacity), data, source, source + block);
                }
            }
        }
    }

    /**
     * Copy one stream out of `streams` to a row of `target`.
     * @param {TypedArray} source
     * @param {number} from
     * @param {number} streams
     * @param {TypedArray} target
     * @param {number} row
     */
    #copyRow(source, from, streams, target, row) {
        const axis = this.spec.batch_axis;
        const size = product(this.shape.slice(axis + 1));
        for (let i = 0; i < product(this.shape.slice(0, axis)); i += 1) {
            const place = (i * streams + from) * size;
            copy(target, (i * this.batch + row) * size, source, place, place + size);
        }
    }

    /** @param {number} row */
    reset(row) {
        this.#copyRow(this.#start, 0, 1, this.data, row);
        this.written[row] = 0;
    }

    /** @returns {SavedState} */
    saved() {
        return { shape: [...this.shape], data: this.data.slice(), written: [...this.written] };
    }

    /**
     * Why this cannot be restored, as part of a sentence; null if it can.
     * @param {SavedState} saved
     */
    fault({ shape }) {
        if (tuple(shape) === tuple(this.shape)) return null;
        return `${this.spec.name} has shape ${tuple(shape)}, this session's ${tuple(this.shape)}`;
    }

    /** @param {SavedState} saved */
    restore(saved) {
        this.data = saved.data.slice();
        this.written = [...saved.written];
    }
}
