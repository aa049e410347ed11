/**
 * What kind of thing went wrong, as in the C++ host:
 * usage (an option that cannot work), bundle (damaged, changed or newer), input (tokens or shapes that do not fit),
 * engine (the runtime failed), unavailable (the runtime cannot run this here).
 * @typedef {"usage" | "bundle" | "input" | "engine" | "unavailable"} Fault
 */

/** Every expected error. Its message is one sentence: what was wanted, what came, what to do. */
export class MsCompileError extends Error {
    /**
     * @param {Fault} fault
     * @param {string} message
     * @param {ErrorOptions} [options]
     */
    constructor(fault, message, options) {
        super(message, options);
        this.name = "MsCompileError";
        this.fault = fault;
    }
}
