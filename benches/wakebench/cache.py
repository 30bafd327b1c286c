"""Putting files out of the page cache, and proving that they are out (or in)."""
import ctypes
import mmap
import os

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def resident_pages(path):
    """Pages of a file that are in the page cache."""
    size = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        vector = (ctypes.c_ubyte * ((size + 4095) // 4096))()
        if LIBC.mincore(address, size, vector) != 0:
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
        LIBC.munmap(address, size)
    finally:
        os.close(descriptor)
    return sum(byte & 1 for byte in bytes(vector))


def evict(paths):
    """Drop files from the page cache; an error if anything of them stays."""
    for path in paths:
        with open(path, "r+b") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if left := resident_pages(path):
            raise RuntimeError(f"{path}: {left} pages stay in the page cache")
