#!lua flags=allow-oom
-- told: a provider tells what became of a delivery.
-- ARGV[1] event (as it stands in keys)  ARGV[2] for how long it counts once (ms)  ARGV[3] id of the delivery  ARGV[4] status
-- ARGV[5] error (JSON; '' none)
-- Returns: time (us), 'applied' | 'late' (it stands higher already; nothing was changed) | 'duplicate' (this event was told
--   before) | 'unknown_delivery'; and of an applied one: its type, its provider, how long it took since it was due (ms).
-- Invariant: a status only rises, so events may come in any order and any number of times.
local now_us = clock_us()
local event, id = KEY.told .. ARGV[1], ARGV[3]
check_type(event, 'string')
check_type(KEY.delivery .. id, 'hash')
check_type(KEY.events, 'stream')
if call('EXISTS', event) == 1 then return {digits(now_us), 'duplicate'} end
local delivery = read_delivery(id)
if not delivery then return {digits(now_us), 'unknown_delivery'} end
call('SET', event, id, 'PX', ARGV[2])
if not raise_delivery(id, delivery, ARGV[4], ARGV[5], now_us) then return {digits(now_us), 'late'} end
return {digits(now_us), 'applied', delivery.type, delivery.provider or '',
  digits(math.max(0, math.floor(now_us / 1000) - tonumber(delivery.due_ms)))}
