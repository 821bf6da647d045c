#!lua
-- person: who a report is about: their epoch, made when there is none, and what was last asked for them.
-- ARGV[1] person (as it stands in keys)  ARGV[2] epoch for one who has none  ARGV[3] for how long it is known from now (ms)
-- Returns: time (us), epoch, last input ('' none).
-- Invariant: a person has one epoch until they are erased, and never the same again.
local key = KEY.user .. ARGV[1]
check_type(key, 'hash')
check_type(KEY.input .. ARGV[1], 'string')
call('HSETNX', key, 'epoch', ARGV[2])
if call('PTTL', key) < tonumber(ARGV[3]) then call('PEXPIRE', key, ARGV[3]) end
return {digits(clock_us()), call('HGET', key, 'epoch'), call('GET', KEY.input .. ARGV[1]) or ''}
