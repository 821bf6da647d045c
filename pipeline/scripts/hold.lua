#!lua flags=allow-oom
-- hold: leave a provider alone for a while: it has asked for that.
-- ARGV[1] provider  ARGV[2] for how long (ms)
-- Returns: time (us), how long it is left alone from now on (ms).
-- Invariant: a hold makes none shorter that is there already.
local now_us = clock_us()
local key, now_ms = KEY.provider .. ARGV[1], math.floor(now_us / 1000)
check_type(key, 'hash')
local until_ms = math.max(now_ms + tonumber(ARGV[2]), tonumber(call('HGET', key, 'held_until_ms') or '0'))
call('HSET', key, 'held_until_ms', digits(until_ms))
if call('PTTL', key) < until_ms - now_ms then call('PEXPIRE', key, digits(until_ms - now_ms)) end
return {digits(now_us), digits(until_ms - now_ms)}
