/* What went wrong, for rf_last_error(). */
#ifndef RADIO_FAST_STATUS_H
#define RADIO_FAST_STATUS_H

#include "radio_fast.h"

namespace rf {

/* Keep a printf-style text as this thread's last error and return `status`. */
__attribute__((format(printf, 2, 3))) rf_status fail(rf_status status, const char *format, ...);

/* Forget this thread's last error; every entry of the ABI begins with it. */
void clear_error();

}  // namespace rf
#endif
