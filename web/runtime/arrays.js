/** Typed arrays by numpy's names of dtypes. Half-precision numbers are held as their bits. */

import { MsCompileError } from "./error.js";
import { quoted } from "./text.js";

/**
 * @typedef {Int8Array | Int16Array | Int32Array | Uint8Array | Uint16Array | Float32Array | Float64Array} NumberArray
 * @typedef {NumberArray | BigInt64Array} TypedArray
 */

const ARRAYS = new Map(
    /** @type {[string, new (size: number) => TypedArray][]} */ ([
        ["bool", Uint8Array],
        ["int8", Int8Array],
        ["int16", Int16Array],
        ["int32", Int32Array],
        ["int64", BigInt64Array],
        ["uint8", Uint8Array],
        ["float16", Uint16Array],
        ["float32", Float32Array],
        ["float64", Float64Array],
    ]),
);

/**
 * Zeros.
 * @param {string} dtype
 * @param {number} size
 * @returns {TypedArray}
 */
export function zeros(dtype, size) {
    const Kind = /** @type {new (size: number) => TypedArray} */ (ARRAYS.get(dtype));
    try {
        return new Kind(size);
    } catch (error) {
        const why = "the states need more memory than there is; open a session of fewer streams";
        throw new MsCompileError("engine", why, { cause: error });
    }
}

/**
 * Elements `from` to `to` of `source`, at `place` of `target`; both are of the same kind.
 * @param {TypedArray} target
 * @param {number} place
 * @param {TypedArray} source
 * @param {number} from
 * @param {number} to
 */
export function copy(target, place, source, from, to) {
    /** @type {any} */ (target).set(source.subarray(from, to), place);
}

/**
 * A number as an element of this dtype.
 * @param {string} dtype
 * @param {number} value
 * @param {string} state
 * @returns {number | bigint}
 */
export function element(dtype, value, state) {
    if (dtype === "float16") return half(value);
    if (dtype.startsWith("float")) return value;
    const array = zeros(dtype, 1);
    const whole = Math.trunc(value);
    const wanted = dtype === "bool" ? Number(value !== 0) : whole;
    if (Number.isFinite(value)) array[0] = array instanceof BigInt64Array ? BigInt(whole) : wanted;
    if (Number(array[0]) !== wanted) {
        const begins = `state ${quoted(state)} begins with ${value}, which ${dtype} cannot hold`;
        throw new MsCompileError("bundle", `${begins}; export the bundle again`);
    }
    return array[0];
}

/**
 * The bits of IEEE 754 binary16, rounded to nearest even.
 * @param {number} value
 */
export function half(value) {
    if (Number.isNaN(value)) return 0x7e00;
    const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
    const size = Math.abs(value);
    if (size >= 65520) return sign | 0x7c00;
    const exponent = size < 2 ** -14 ? -14 : Math.floor(Math.log2(size));
    const scaled = size * 2 ** (10 - exponent);
    const floor = Math.floor(scaled);
    const up = scaled - floor > 0.5 || (scaled - floor === 0.5 && floor % 2 === 1);
    const steps = floor + Number(up); // of the last place
    return sign | (steps < 1024 ? steps : (exponent + 14) * 1024 + steps);
}
