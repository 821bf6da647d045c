#!lua
-- incoming: accept a message that a provider brings from outside, once: note its event, and start the job that carries it on.
-- ARGV[1] event (as it stands in keys)  ARGV[2] for how long it counts once (ms)  ARGV[3] job id
-- ARGV[4] tail (envelope without its head)  ARGV[5] stream  ARGV[6] tenant  ARGV[7] deadline_ms  ARGV[8] its record (see
--   prelude)  ARGV[9] max live jobs  ARGV[10] max events that wait to be recorded
-- Returns: time (us), 'accepted' | 'duplicate' (this event was brought before) | 'overloaded' | 'backlog'.
-- Invariant: one job per event. May be sent again: it says 'duplicate' then, and the job is there.
local now_us = clock_us()
local event, id = KEY.told .. ARGV[1], ARGV[3]
check_type(event, 'string')
check_accept()
check_type(ARGV[5], 'stream')
check_type(KEY.events, 'stream')
if call('EXISTS', event) == 1 then return {digits(now_us), 'duplicate'} end
if call('ZCARD', KEY.live_index) >= tonumber(ARGV[9]) then return {digits(now_us), 'overloaded'} end
if call('XLEN', KEY.events) >= tonumber(ARGV[10]) then return {digits(now_us), 'backlog'} end
call('SET', event, id, 'PX', ARGV[2])
local more = {'deadline', ARGV[7]}
note_record(more, id, ARGV[6], ARGV[8], now_us)
accept(id, ARGV[4], ARGV[5], ARGV[6], ARGV[7], 0, now_us, more)
conclude()
return {digits(now_us), 'accepted'}
