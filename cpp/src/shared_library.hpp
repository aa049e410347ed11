// Shared libraries of runtimes: found, loaded while the program runs, and kept.
#pragma once

#include <string>

namespace mscompile {

/// Where a runtime's library is looked for, in this order, and what is said of it.
struct LibrarySearch {
    std::string title;     ///< in messages
    std::string variable;  ///< of the environment, which may name the file
    std::string folder;    ///< below the site-packages of a Python
    std::string file;      ///< what its name begins with there
    std::string soname;    ///< of the system's
    std::string package;   ///< what pip calls it
};

class SharedLibrary {
  public:
    /// The path of the library. Throws Error (unavailable) where there is none.
    static std::string find(const LibrarySearch& search);

    /// Loads a library, for as long as the process lives: its threads may outlive any object of ours.
    /// Throws Error (unavailable) where that fails.
    SharedLibrary(std::string path, const LibrarySearch& search);

    [[nodiscard]] const std::string& path() const { return path_; }

    /// A function of the library. Throws Error (unavailable) where it has none of this name.
    template <class Function>
    [[nodiscard]] Function* function(const char* name) const {
        return reinterpret_cast<Function*>(symbol(name));
    }

  private:
    [[nodiscard]] void* symbol(const char* name) const;
    [[nodiscard]] std::string remedy() const;

    std::string path_;
    LibrarySearch search_;
    void* handle_;
};

}  // namespace mscompile
