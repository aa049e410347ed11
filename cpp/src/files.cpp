#include "files.hpp"

#include <openssl/evp.h>

#include <cerrno>
#include <fstream>
#include <memory>
#include <system_error>
#include <vector>

#include "text.hpp"

namespace mscompile {

namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.json";
constexpr const char* kAgain = "export or copy it again";
constexpr std::int64_t kBigFile = std::int64_t{64} << 20U;
constexpr std::size_t kBlock = std::size_t{1} << 20U;

[[noreturn]] void cannot_read(const fs::path& path) {
    const auto why = errno != 0 ? std::generic_category().message(errno) : "it cannot be opened";
    throw Error(Fault::bundle, "cannot read " + path.string() + ": " + why);
}

std::ifstream opened(const fs::path& path) {
    errno = 0;
    std::ifstream stream(path, std::ios::binary);
    if (!stream) cannot_read(path);
    return stream;
}

class Sha256 {
  public:
    Sha256() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
        check(context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
    }

    void add(const char* data, std::size_t size) { check(EVP_DigestUpdate(context_.get(), data, size) == 1); }

    std::string hexadecimal() {
        constexpr std::string_view kHex = "0123456789abcdef";
        std::vector<unsigned char> digest(EVP_MAX_MD_SIZE);
        unsigned size = 0;
        check(EVP_DigestFinal_ex(context_.get(), digest.data(), &size) == 1);
        std::string text;
        for (unsigned i = 0; i < size; ++i) text += {kHex[digest[i] >> 4U], kHex[digest[i] & 15U]};
        return text;
    }

  private:
    static void check(bool worked) {
        if (!worked) throw Error(Fault::bundle, "OpenSSL cannot compute a sha256 here");
    }

    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

std::string sha256_of_file(const fs::path& path) {
    auto stream = opened(path);
    std::vector<char> block(kBlock);
    Sha256 hash;
    while (stream) {
        stream.read(block.data(), static_cast<std::streamsize>(block.size()));
        hash.add(block.data(), static_cast<std::size_t>(stream.gcount()));
    }
    if (stream.bad()) cannot_read(path);
    return hash.hexadecimal();
}

/// The size of every file below, by relative path.
std::map<std::string, std::int64_t> listed(const fs::path& directory) {
    std::map<std::string, std::int64_t> sizes;
    for (auto entry = fs::recursive_directory_iterator(directory); entry != fs::recursive_directory_iterator();
         ++entry) {
        const auto name = entry->path().lexically_relative(directory).generic_string();
        const auto where = directory.string() + ": " + in_quotes(name);
        if (entry->is_symlink())
            throw Error(Fault::bundle, where + " is a symbolic link, which a bundle cannot hold; " + kAgain);
        if (entry->is_directory()) continue;
        if (!entry->is_regular_file())
            throw Error(Fault::bundle, where + " is not a plain file; remove it, or " + kAgain);
        sizes[name] = static_cast<std::int64_t>(entry->file_size());
    }
    return sizes;
}

}  // namespace

std::string read_file(const fs::path& path, std::int64_t limit) {
    auto stream = opened(path);
    stream.seekg(0, std::ios::end);
    const auto size = static_cast<std::int64_t>(stream.tellg());
    if (size < 0) cannot_read(path);
    if (size > limit)
        throw Error(Fault::bundle, path.string() + " has " + std::to_string(size) + " bytes, more than " +
                                       std::to_string(limit) + "; " + kAgain);
    std::string content(static_cast<std::size_t>(size), '\0');
    stream.seekg(0);
    stream.read(content.data(), size);
    if (stream.gcount() != size) cannot_read(path);
    return content;
}

std::string sha256_of(std::string_view text) {
    Sha256 hash;
    hash.add(text.data(), text.size());
    return hash.hexadecimal();
}

void check_files(const fs::path& directory, const std::map<std::string, FileEntry>& files, bool hash_files) {
    const auto found = listed(directory);
    const auto where = [&directory](const std::string& name) {
        return directory.string() + ": file " + in_quotes(name);
    };
    for (const auto& [name, entry] : files)
        if (found.count(name) == 0)
            throw Error(Fault::bundle, where(name) + " is listed in " + kManifest + " and missing; " + kAgain);
    for (const auto& [name, size] : found)
        if (name != kManifest && files.count(name) == 0)
            throw Error(Fault::bundle, where(name) + " is not listed in " + kManifest + "; remove it, or " + kAgain);
    for (const auto& [name, entry] : files)
        if (found.at(name) != entry.size_bytes)
            throw Error(Fault::bundle, where(name) + " has " + std::to_string(found.at(name)) + " bytes, and " +
                                           kManifest + " says " + std::to_string(entry.size_bytes) +
                                           "; the bundle is damaged or was changed, " + kAgain);
    for (const auto& [name, entry] : files)
        if ((hash_files || entry.size_bytes <= kBigFile) && sha256_of_file(directory / name) != entry.sha256)
            throw Error(Fault::bundle, where(name) + " does not have the sha256 that " + kManifest +
                                           " says; the bundle is damaged or was changed, " + kAgain);
}

}  // namespace mscompile
