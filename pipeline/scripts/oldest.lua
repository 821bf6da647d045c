#!lua flags=no-writes
-- oldest: how long has the oldest entry been on each stream?
-- KEYS streams
-- Returns: age (ms) per stream, in order; -1 where a stream is empty. Read here, where entries need not travel to be
--   looked at. The age is the difference of two readings of this clock, for people to look at: it is wrong when the clock
--   was set in between, and nothing is decided by it.
local now_ms = clock_us() / 1000
local answer = {}
for i, stream in ipairs(KEYS) do
  local entry = call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
  answer[i] = entry and math.max(0, math.floor(now_ms - tonumber(string.match(entry[1], '^%d+')))) or -1
end
return answer
