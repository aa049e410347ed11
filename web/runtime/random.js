/**
 * The random numbers of numpy's default_rng: PCG64 (O'Neill's PCG XSL RR 128/64), seeded by NEP 19's SeedSequence
 * (O'Neill's seed_seq_fe with a pool of four words).
 */

import { MsCompileError } from "./error.js";

const MASK_64 = (1n << 64n) - 1n;
const MASK_128 = (1n << 128n) - 1n;
const MULTIPLIER = (2549297995355413924n << 64n) | 4865540595714422341n;

export class Random {
    /** @type {bigint} */ #state;
    /** @type {bigint} */ #increment;

    /** @param {number | bigint | null} seed  0 to 2^64 - 1; null: one of the system */
    constructor(seed) {
        const [first, second, third, fourth] = words(pool(seed === null ? entropy() : checked(seed)));
        this.#increment = ((((third << 64n) | fourth) << 1n) | 1n) & MASK_128;
        const state = (this.#increment + ((first << 64n) | second)) & MASK_128;
        this.#state = (state * MULTIPLIER + this.#increment) & MASK_128;
    }

    /** A number of 0 to 1, 1 excluded. */
    uniform() {
        this.#state = (this.#state * MULTIPLIER + this.#increment) & MASK_128;
        const folded = (this.#state >> 64n) ^ (this.#state & MASK_64);
        const turn = this.#state >> 122n;
        const word = ((folded >> turn) | (folded << (64n - turn))) & MASK_64;
        return Number(word >> 11n) * 2 ** -53;
    }
}

/** @param {number | bigint} seed */
function checked(seed) {
    const whole = typeof seed === "bigint" || Number.isSafeInteger(seed) ? BigInt(seed) : -1n;
    if (0n <= whole && whole <= MASK_64) return whole;
    throw new MsCompileError("input", `the seed must be a whole number of 0 to 2^64 - 1, not ${seed}`);
}

function entropy() {
    const [word] = crypto.getRandomValues(new BigUint64Array(1));
    return word;
}

/** @param {bigint} seed */
function pool(seed) {
    let constant = 0x43b0d7e5;
    const hashed = (/** @type {number} */ value) => {
        const mixture = value ^ constant;
        constant = Math.imul(constant, 0x931e8875);
        const product = Math.imul(mixture, constant);
        return product ^ (product >>> 16);
    };
    const mixed = (/** @type {number} */ a, /** @type {number} */ b) => {
        const value = (Math.imul(a, 0xca01f9dd) - Math.imul(b, 0x4973f715)) | 0;
        return value ^ (value >>> 16);
    };
    const words = [Number(seed & 0xffffffffn), Number(seed >> 32n), 0, 0].map(hashed);
    for (const from of words.keys()) {
        for (const to of words.keys()) {
            if (from !== to) words[to] = mixed(words[to], hashed(words[from]));
        }
    }
    return words;
}

/**
 * Eight words of output as four of 64 bits.
 * @param {number[]} pool
 */
function words(pool) {
    let constant = 0x8b51f9dd;
    const found = [0n, 0n, 0n, 0n];
    for (let i = 0; i < 8; i += 1) {
        const mixture = pool[i % pool.length] ^ constant;
        constant = Math.imul(constant, 0x58f38ded);
        const product = Math.imul(mixture, constant);
        const value = BigInt((product ^ (product >>> 16)) >>> 0);
        found[i >> 1] |= value << (i % 2 === 0 ? 0n : 32n);
    }
    return found;
}
