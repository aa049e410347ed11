/** Text to token ids and back, for vocabularies of single characters. */

import { MsCompileError } from "./error.js";
import { quoted } from "./text.js";

export class Tokenizer {
    /** @param {readonly string[]} tokens  the text of every token, by id */
    constructor(tokens) {
        this.tokens = tokens;
        /** @type {Map<string, number>} */
        this.ids = new Map();
        for (const [id, token] of tokens.entries()) {
            if (this.ids.has(token)) {
                const twice = `the vocabulary has ${quoted(token)} twice; every token needs a text of its own`;
                throw new MsCompileError("input", twice);
            }
            this.ids.set(token, id);
        }
    }

    /**
     * @param {string} text
     * @returns {number[]}
     */
    encode(text) {
        const long = this.tokens.findIndex((token) => Array.from(token).length !== 1);
        if (long >= 0) {
            const which = `token ${long} is ${quoted(this.tokens[long])}`;
            const advice = "give token ids from the tokenizer that the model was trained with";
            throw new MsCompileError("input", `this vocabulary is not of single characters: ${which}; ${advice}`);
        }
        return Array.from(text, (character, position) => {
            const id = this.ids.get(character);
            if (id !== undefined) return id;
            const lacks = `the vocabulary has no ${quoted(character)} (position ${position} of the text)`;
            const advice = "leave it out or replace it with a character that the model knows";
            throw new MsCompileError("input", `${lacks}; ${advice}`);
        });
    }

    /** @param {Iterable<number>} ids */
    decode(ids) {
        return Array.from(ids, (id) => {
            const token = this.tokens[id];
            if (token !== undefined) return token;
            const known = `the vocabulary has ids 0 to ${this.tokens.length - 1}`;
            throw new MsCompileError("input", `token id ${id} is out of range: ${known}`);
        }).join("");
    }
}
