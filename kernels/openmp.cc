#include "openmp.h"

#include <string>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace pio {

#if defined(__linux__)
namespace {

int collect(dl_phdr_info* info, size_t, void* context) {
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string file = path.substr(path.find_last_of('/') + 1);
  if (file.rfind("libgomp", 0) == 0 || file.rfind("libiomp5", 0) == 0 || file.rfind("libomp", 0) == 0)
    static_cast<std::vector<std::string>*>(context)->push_back(path);
  return 0;
}

std::string choose(const std::vector<std::string>& paths) {
  if (paths.size() == 1) return paths[0];
  for (const auto& path : paths)
    if (path.find("/torch") != std::string::npos) return path;
  return "";
}

}  // namespace

OpenmpParallel find_openmp() {
  std::vector<std::string> paths;
  dl_iterate_phdr(collect, &paths);
  const std::string path = choose(paths);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  return library ? reinterpret_cast<OpenmpParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
}
#else
OpenmpParallel find_openmp() { return nullptr; }
#endif

}  // namespace pio
