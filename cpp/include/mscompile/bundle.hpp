// A bundle: one directory that holds a compiled model and all that is known about it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "mscompile/session.hpp"
#include "mscompile/spec.hpp"
#include "mscompile/tokenizer.hpp"

namespace mscompile {

/// What a file must be: its SHA-256 in hexadecimal, and its size.
struct FileEntry {
    std::string sha256;
    std::int64_t size_bytes = 0;
};

/// What a manifest says, as far as a host needs it.
struct Manifest {
    std::string name;
    std::string title;
    std::string family;
    std::string precision;
    bool verified = false;
    std::vector<std::string> engines;  ///< built into the bundle
    StreamSpec spec;
    std::map<std::string, FileEntry> files;  ///< every file but the manifest
};

/// Reads the text of a manifest, strictly. `bundle` is the directory's name in messages.
/// Throws Error (bundle) where it is damaged, contradicts itself or is of a newer schema.
Manifest parse_manifest(std::string_view text, const std::string& bundle);

/// How to run a session.
struct SessionOptions {
    std::string engine;      ///< of the bundle; empty: the first that this library can run
    std::int64_t batch = 1;  ///< streams
    int threads = 0;         ///< of one call; 0: as many as the runtime likes. Sessions of one engine share it
    std::string library;     ///< the runtime's shared library; empty: found as `find_onnxruntime` does
    Sources sources;         ///< one for each host input of the model
};

/// The library that ONNX Runtime is loaded from where none is named: that of the environment variable
/// MSCOMPILE_ONNXRUNTIME, that of the Python package in $VIRTUAL_ENV or beside a `python3` on the PATH, or the
/// system's `libonnxruntime.so.1`. Throws Error (unavailable) where there is none.
std::string find_onnxruntime();

/// An opened bundle, every file of which was held against its size and hash. Engines are loaded when first asked for
/// and kept; sessions outlive the bundle. Not for use by two threads at once, unlike its sessions.
class Bundle {
  public:
    /// Without `hash_files`, files over 64 MiB are only checked for their size.
    /// Throws Error (bundle), in one sentence, for anything that is not exactly what the manifest says.
    static Bundle open(const std::string& path, bool hash_files = true);

    [[nodiscard]] const std::string& path() const { return path_; }
    [[nodiscard]] const Manifest& manifest() const { return *manifest_; }
    [[nodiscard]] const StreamSpec& spec() const { return manifest_->spec; }

    /// Throws Error (bundle) where the vocabulary was not known at export.
    [[nodiscard]] Tokenizer tokenizer() const;

    /// A new group of streams at position 0. Throws Error: usage for an engine that the bundle lacks, unavailable
    /// where it cannot run here, input for a batch or sources that do not fit.
    Session session(const SessionOptions& options = {});

    /// The engine of such sessions, for hosts that wrap it or share it in their own way.
    std::shared_ptr<const Backend> backend(const SessionOptions& options = {});

  private:
    Bundle(std::string path, std::shared_ptr<const Manifest> manifest);

    std::string path_;
    std::shared_ptr<const Manifest> manifest_;
    std::map<std::string, std::shared_ptr<const Backend>> backends_;
};

}  // namespace mscompile
