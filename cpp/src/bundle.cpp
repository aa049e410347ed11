#include "mscompile/bundle.hpp"

#include <algorithm>
#include <filesystem>

#include "engines.hpp"
#include "files.hpp"
#include "text.hpp"

namespace mscompile {

namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kManifestLimit = std::int64_t{64} << 20U;

/// Whether an export is writing the directory, or was killed while it did: `.NAME.` 8 hexadecimal digits and an ending.
bool is_partial(const fs::path& path) {
    const auto name = fs::canonical(path).filename();
    const auto ending = name.extension();
    const auto random = name.stem().extension().string();
    return name.string().front() == '.' && (ending == ".partial" || ending == ".aside") && random.size() == 9 &&
           random.find_first_not_of("0123456789abcdef", 1) == std::string::npos && name.stem().stem() != "";
}

Manifest read(const fs::path& path, bool hash_files) {
    const auto name = path.string();
    if (!fs::is_directory(path))
        throw Error(Fault::bundle,
                    name + " is not a bundle: " + (fs::exists(path) ? "it is not a directory" : "no such directory"));
    if (is_partial(path))
        throw Error(Fault::bundle, name + " is an export that is under way or was stopped; open the finished bundle");
    const auto file = path / "manifest.json";
    const auto kind = fs::symlink_status(file).type();
    if (kind == fs::file_type::not_found)
        throw Error(Fault::bundle, name + " is not a bundle: it has no manifest.json");
    if (kind != fs::file_type::regular)
        throw Error(Fault::bundle, name + " is not a bundle: its manifest.json is not a plain file");
    auto manifest = parse_manifest(read_file(file, kManifestLimit), name);
    check_files(path, manifest.files, hash_files);
    return manifest;
}

const EngineRow& find(const std::string& name) {
    for (const auto& row : engines())
        if (row.name == name) return row;
    std::vector<std::string> known;
    for (const auto& row : engines()) known.push_back(row.name);
    throw Error(Fault::unavailable,
                "this build of mscompile has no engine " + in_quotes(name) + "; it has " + join(known));
}

/// The first engine of the bundle that this library has.
std::string usual(const std::vector<std::string>& built, const std::string& path) {
    if (built.empty()) throw Error(Fault::usage, path + " holds graphs only; export again with --target ort to run it");
    for (const auto& row : engines())
        if (std::find(built.begin(), built.end(), row.name) != built.end()) return row.name;
    return built.front();
}

}  // namespace

Bundle::Bundle(std::string path, std::shared_ptr<const Manifest> manifest)
    : path_(std::move(path)), manifest_(std::move(manifest)) {}

Bundle Bundle::open(const std::string& path, bool hash_files) {
    auto whole = fs::path(path).lexically_normal();
    if (!whole.has_filename() && whole.has_parent_path()) whole = whole.parent_path();  // "name.msc/"
    try {
        return {whole.string(), std::make_shared<const Manifest>(read(whole, hash_files))};
    } catch (const fs::filesystem_error& error) {
        throw Error(Fault::bundle, "cannot read " + error.path1().string() + ": " + error.code().message());
    }
}

Tokenizer Bundle::tokenizer() const {
    const auto path = fs::path(path_) / "tokenizer.json";
    if (!fs::is_regular_file(path))
        throw Error(Fault::bundle, path_ + " has no tokenizer: its vocabulary was not known at export; use token ids");
    return Tokenizer::load(path.string());
}

Session Bundle::session(const SessionOptions& options) {
    const std::shared_ptr<const StreamSpec> spec(manifest_, &manifest_->spec);
    return {spec, backend(options), options.batch, options.sources};
}

std::shared_ptr<const Backend> Bundle::backend(const SessionOptions& options) {
    const auto& built = manifest_->engines;
    const auto name = options.engine.empty() ? usual(built, path_) : options.engine;
    if (std::find(built.begin(), built.end(), name) == built.end())
        throw Error(Fault::usage,
                    path_ + " was not built for " + name + "; it has " + (built.empty() ? "no engine" : join(built)));
    const auto& row = find(name);
    auto& kept = backends_[name + "\n" + std::to_string(options.threads) + "\n" + options.library];
    if (!kept) kept = row.load({path_, manifest_->spec, options.threads, options.library});
    return kept;
}

}  // namespace mscompile
