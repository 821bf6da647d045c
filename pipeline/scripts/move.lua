#!lua flags=allow-oom
-- move: change the replica of a job in hand: give back its place, take the first free one of an order.
-- ARGV[1] stream  ARGV[2] group  ARGV[3] entry  ARGV[4] delivery count  ARGV[5] consumer  ARGV[6] job id
-- then per replica, in order: URL, slots
-- Returns: 'lost' | 'none' | the URL.
-- Invariant: only the entry's owner moves its lease; the job holds at most one lease and one place. The keys of what it
--   gives up are checked before the first write, and a replica with a key of a wrong type is passed over.
local owner, count = pending(ARGV[1], ARGV[2], ARGV[3])
local id = ARGV[6]
local live = call('HMGET', KEY.live .. id, 'entry', 'lease')
if owner ~= ARGV[5] or count ~= tonumber(ARGV[4]) or live[1] ~= ARGV[3] then return 'lost' end
local function is_sound(url)
  return has_type(KEY.leases .. url, 'zset') and has_type(KEY.running .. url, 'zset')
end
if live[2] and not is_sound(live[2]) then error('a key of ' .. live[2] .. ' should be a zset') end
local now_us = clock_us()
unlease(id, live[2])
for i = 7, #ARGV, 2 do
  local url = ARGV[i]
  if is_sound(url) and call('ZCARD', KEY.running .. url) < tonumber(ARGV[i + 1]) then
    call('HSET', KEY.live .. id, 'lease', url)
    lease(id, url, now_us)
    call('ZADD', KEY.running .. url, digits(now_us), id)
    conclude()
    return url
  end
end
call('HDEL', KEY.live .. id, 'lease')
conclude()
return 'none'
