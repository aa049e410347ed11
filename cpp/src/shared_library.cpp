#include "shared_library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <utility>
#include <vector>

#include "mscompile/error.hpp"

namespace mscompile {

namespace {

namespace fs = std::filesystem;

/// The file of the Python package below a prefix such as /usr/local; empty where there is none.
std::string of_python(const fs::path& prefix, const LibrarySearch& search) {
    std::error_code error;
    for (const auto& python : fs::directory_iterator(prefix / "lib", error)) {
        if (python.path().filename().string().rfind("python3", 0) != 0) continue;
        for (const auto* packages : {"site-packages", "dist-packages"})
            for (const auto& file : fs::directory_iterator(python.path() / packages / search.folder, error))
                if (file.path().filename().string().rfind(search.file, 0) == 0) return file.path().string();
    }
    return {};
}

std::string variable(const std::string& name) {
    const char* value = std::getenv(name.c_str());
    return value == nullptr ? "" : value;
}

/// Where a `python3` would have its packages.
std::vector<fs::path> python_prefixes() {
    std::vector<fs::path> prefixes;
    if (const auto active = variable("VIRTUAL_ENV"); !active.empty()) prefixes.emplace_back(active);
    std::istringstream folders(variable("PATH"));
    for (std::string folder; std::getline(folders, folder, ':');) {
        std::error_code error;
        if (!folder.empty() && fs::exists(fs::path(folder) / "python3", error))
            prefixes.push_back(fs::path(folder).parent_path());
    }
    return prefixes;
}

}  // namespace

std::string SharedLibrary::find(const LibrarySearch& search) {
    if (auto named = variable(search.variable); !named.empty()) return named;
    for (const auto& prefix : python_prefixes())
        if (auto path = of_python(prefix, search); !path.empty()) return path;
    if (dlopen(search.soname.c_str(), RTLD_NOW | RTLD_LOCAL) != nullptr) return search.soname;
    throw Error(Fault::unavailable, search.title + " is not installed; pip install " + search.package + ", or set " +
                                        search.variable + " to the path of " + search.file);
}

SharedLibrary::SharedLibrary(std::string path, const LibrarySearch& search)
    : path_(std::move(path)), search_(search), handle_(dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ != nullptr) return;
    const char* why = dlerror();
    throw Error(Fault::unavailable, search.title + " cannot be loaded from " + path_ + ": " +
                                        (why == nullptr ? "dlopen failed" : why) + remedy());
}

void* SharedLibrary::symbol(const char* name) const {
    void* found = dlsym(handle_, name);
    if (found == nullptr)
        throw Error(Fault::unavailable, path_ + " is not " + search_.title + ": it has no " + name + remedy());
    return found;
}

std::string SharedLibrary::remedy() const {
    return "; give the path of " + search_.file + ", or set " + search_.variable + " to it";
}

}  // namespace mscompile
