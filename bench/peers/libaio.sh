#!/usr/bin/env bash
# libaio for DeepSpeed's asynchronous I/O, without root: Debian's two packages unpacked into a folder.
#   bench/peers/libaio.sh FOLDER          then: source FOLDER/env.sh, and run DeepSpeed under it
# DeepSpeed compiles the op at first use against libaio.h (15 files of C++: minutes), and finds compiler and linker flags
# in the environment. The distribution must be Debian's or Ubuntu's; libaio1 is libaio1t64 since Debian 13.
set -euo pipefail

folder=$(mkdir -p "${1:?usage: bench/peers/libaio.sh FOLDER}" && cd "$1" && pwd)
runtime=$(apt-cache show libaio1t64 >/dev/null 2>&1 && echo libaio1t64 || echo libaio1)
(cd "$folder" && apt-get download -q libaio-dev "$runtime")
for package in "$folder"/*.deb; do
    dpkg -x "$package" "$folder/root"
done
libraries=$(dirname "$(find "$folder/root" -name libaio.a)")
shared=$(dirname "$(find "$folder/root" -name 'libaio.so.1*' -type f | head -1)")
cat > "$folder/env.sh" <<ENV
export DS_ACCELERATOR=cpu CPATH=$folder/root/usr/include LIBRARY_PATH=$libraries:$shared LD_LIBRARY_PATH=$libraries:$shared
export CFLAGS=-I$folder/root/usr/include LDFLAGS="-L$libraries -L$shared"
ENV
echo "source $folder/env.sh"
