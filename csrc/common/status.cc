#include "status.h"

#include <stdarg.h>
#include <stdio.h>

namespace {

thread_local char last_error[1024];

}  // namespace

namespace rf {

rf_status fail(rf_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

void clear_error() { last_error[0] = '\0'; }

}  // namespace rf

int rf_abi_version(void) { return RF_ABI_VERSION; }

const char *rf_last_error(void) { return last_error; }
