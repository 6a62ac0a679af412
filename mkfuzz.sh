set -e
cd /tmp/w/faults
O=.build/fuzz; mkdir -p $O/rest
F="-std=gnu11 -D_GNU_SOURCE -g -I. -Iinterposer/native -Itests/fuzz -Wall -Wextra -Wno-unused-function -Wno-sign-compare -Wno-unknown-attributes"
rm -f $O/librest.a
for f in interposer/native/*.c; do clang -w -std=gnu11 -D_GNU_SOURCE -O1 -g -I. -Iinterposer/native -c $f -o $O/rest/$(basename $f .c).o & [ $(jobs -r | wc -l) -lt 3 ] || wait -n; done; wait
ar rcs $O/librest.a $O/rest/*.o
for t in ${*:-tests/fuzz/*.c}; do n=$(basename $t .c); clang $F -O1 -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -o $O/$n tests/fuzz/$n.c $O/librest.a -lpthread -ldl & done; wait
