/* The compiled device code in the library: written by the build, one entry for each source and architecture. */
#ifndef RADIO_FAST_IMAGES_H
#define RADIO_FAST_IMAGES_H

namespace rf {

struct Image {
    const char *source;         /* "sm80" */
    int arch;                   /* 70, 75, …: runs on devices of the same major and this minor or a later one */
    const unsigned char *data;  /* a cubin */
};

extern const Image images[]; /* by source, then architecture, ascending; the last has a null source */

}  // namespace rf
#endif
