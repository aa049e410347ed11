// Files of a bundle: reading, hashing, and holding them against the manifest.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "mscompile/bundle.hpp"

namespace mscompile {

/// The whole content. Throws Error (bundle) where it cannot be read or has more than `limit` bytes.
std::string read_file(const std::filesystem::path& path, std::int64_t limit);

/// In hexadecimal.
std::string sha256_of(std::string_view text);

/// Throws Error (bundle) unless the directory holds exactly these files and the manifest.
void check_files(const std::filesystem::path& directory, const std::map<std::string, FileEntry>& files,
                 bool hash_files);

}  // namespace mscompile
